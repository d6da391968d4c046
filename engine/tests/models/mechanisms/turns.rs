//! Conversations of two turns: a second prompt is the first, its answer and more, and finds both in the prefix cache.

use quire_engine::{DraftLength, DrafterConfig, Engine, EngineConfig, ModelExecutor, Request};

use super::{
    BLOCK_SIZE, PLENTY, Served, TIGHT, batched, drive, nothing, serve, swap, with_drafter, workload,
};

/// Conversations: fewer than [`PLENTY`] has room for, so that nothing of the cache is given up.
const CONVERSATIONS: usize = 8;
/// Tokens that a second turn adds.
const ADDED: u32 = 5;

/// The second prompts: what was said in the first turn, and more.
fn second(first: &[Request], answers: &[Vec<u32>]) -> Vec<Request> {
    let said = |(request, answer): (&Request, &Vec<u32>)| {
        let more = (0..ADDED).map(|at| (at * 13 + request.id as u32) % 90);
        request.prompt.iter().chain(answer).copied().chain(more).collect()
    };
    let prompts = first.iter().zip(answers).map(said);
    first.iter().zip(prompts).map(|(request, prompt)| Request { prompt, ..request.clone() }).collect()
}

/// Serves both turns over one engine.
fn turns<E: ModelExecutor>(executor: E, config: &EngineConfig, first: &[Request]) -> ([Served; 2], E) {
    let mut engine = Engine::new(executor, config).unwrap();
    let answered = drive(&mut engine, first);
    let answers = drive(&mut engine, &second(first, &answered.outputs));
    ([answered, answers], engine.into_executor())
}

pub(super) fn check<E: ModelExecutor>(new: impl Fn(usize) -> E) {
    // Short enough that a second prompt and its answer fit in the model's length.
    let first: Vec<Request> = workload()
        .into_iter()
        .take(CONVERSATIONS)
        .map(|request| Request { max_tokens: 20, ..request })
        .collect();
    let (answers, executor) = serve(new(PLENTY), &nothing(), None, &first);
    let asked = second(&first, &answers.outputs);
    let (expected, mut executor) = serve(executor, &nothing(), None, &asked);
    assert_eq!(expected.cached(), 0);

    let cached = EngineConfig { prefix_cache: true, ..batched() };
    let look_ups =
        with_drafter(DrafterConfig::NGram { longest: 3, shortest: 1 }, DraftLength::Fixed { tokens: 3 });
    let speculating = EngineConfig { prefix_cache: true, ..look_ups };
    for (name, config) in [("the cache", &cached), ("the cache and proposals", &speculating)] {
        let ([first_served, served], back) = turns(executor, config, &first);
        executor = back;
        assert_eq!(first_served.outputs, answers.outputs, "{name}: first turns");
        assert_eq!(served.outputs, expected.outputs, "{name}: second turns");
        for ((request, answer), found) in first.iter().zip(&answers.outputs).zip(&served.found) {
            // The K and V of an answer's last token are never computed.
            let said = (request.prompt.len() + answer.len() - 1) as u32;
            let prompt = request.prompt.len() as u32;
            assert_eq!(*found, said / BLOCK_SIZE * BLOCK_SIZE, "{name}: request {}", request.id);
            assert!(*found > prompt.next_multiple_of(BLOCK_SIZE), "{name}: no whole block of the answer");
        }
    }
    // Where memory is short, blocks of answers are given up meanwhile; tokens are the same.
    for preemption in [cached.preemption, swap()] {
        let config = EngineConfig { preemption, ..cached.clone() };
        let ([first_served, served], _) = turns(new(TIGHT), &config, &first);
        assert_eq!(first_served.outputs, answers.outputs, "{preemption:?}");
        assert_eq!(served.outputs, expected.outputs, "{preemption:?}");
        assert!(served.preempted > 0 && served.cached() > 0, "{preemption:?}: {served:?}");
    }
}
