//! The prefix cache: what is found, by whom, and what goes first when memory is short.

use std::collections::BTreeMap;
use std::time::Instant;

use quire_engine::{
    Engine, EngineConfig, Event, KvLayout, PolicyConfig, PreemptionConfig, Request, SchedulerConfig,
    StepStats,
};

use crate::fake::{Fake, Outcome, drain, engine, reference, request};

const SLOTS: usize = 96;

fn config(prefix_cache: bool) -> EngineConfig {
    let policy = PolicyConfig::Continuous { watermark: 0.0 };
    let scheduler = SchedulerConfig { policy, token_budget: 64, ..SchedulerConfig::default() };
    EngineConfig {
        scheduler,
        kv: KvLayout::Paged { block_size: 4 },
        prefix_cache,
        share_blocks: true,
        preemption: PreemptionConfig::default(),
        speculation: None,
        max_model_len: None,
    }
}

/// Runs a request to its end: prompt tokens found, prompt tokens computed.
fn run(engine: &mut Engine<Fake>, request: &Request) -> (u32, u32) {
    let (mut now, mut outcomes) = (Instant::now(), BTreeMap::new());
    engine.submit(request.clone(), now);
    let steps = drain(engine, &mut now, &mut outcomes);
    let outcome = &outcomes[&request.id];
    assert_eq!(outcome.tokens, reference(request, 64, SLOTS as u32).0);
    (found(outcome), prefilled(&steps))
}

fn found(outcome: &Outcome) -> u32 {
    match outcome.end {
        Some(Event::Finished { cached_tokens, .. }) => cached_tokens,
        ref other => panic!("not finished: {other:?}"),
    }
}

fn prefilled(steps: &[StepStats]) -> u32 {
    steps.iter().map(|step| step.batch.prefill_tokens).sum()
}

/// A request with the prompt of another.
fn like(id: u64, other: &Request) -> Request {
    Request { id, prompt: other.prompt.clone(), ..request(id, 1, 3) }
}

#[test]
fn a_prompt_seen_before_is_found_but_for_its_last_token() {
    let first = request(1, 17, 3);
    for (cache, expected) in [(true, (16, 1)), (false, (0, 17))] {
        let mut engine = engine(&config(cache), SLOTS, 64);
        assert_eq!(run(&mut engine, &first), (0, 17));
        assert_eq!(run(&mut engine, &like(2, &first)), expected);
    }
    // Of a prompt of whole blocks the last block is computed, for the logits after it.
    let mut engine = engine(&config(true), SLOTS, 64);
    let whole = request(3, 16, 3);
    run(&mut engine, &whole);
    assert_eq!(run(&mut engine, &like(4, &whole)), (12, 4));
}

#[test]
fn only_a_common_beginning_counts() {
    let mut engine = engine(&config(true), SLOTS, 64);
    let first = request(1, 20, 3);
    run(&mut engine, &first);
    let mut other = like(2, &first);
    other.prompt[9] += 1;
    assert_eq!(run(&mut engine, &other).0, 8, "two blocks are as they were; what follows the change is not");
    let mut late = like(3, &first);
    late.prompt.remove(0);
    assert_eq!(run(&mut engine, &late).0, 0);
}

#[test]
fn a_salt_keeps_requests_apart() {
    let mut engine = engine(&config(true), SLOTS, 64);
    let first = request(1, 17, 3);
    run(&mut engine, &first);
    assert_eq!(run(&mut engine, &Request { cache_salt: 7, ..like(2, &first) }).0, 0);
    assert_eq!(run(&mut engine, &Request { cache_salt: 7, ..like(3, &first) }).0, 16);
    assert_eq!(run(&mut engine, &like(4, &first)).0, 16);
}

#[test]
fn a_conversation_finds_its_answers_too() {
    let mut engine = engine(&config(true), SLOTS, 64);
    let first = request(1, 10, 9);
    run(&mut engine, &first);
    let (answer, _) = reference(&first, 64, SLOTS as u32);
    let mut next = request(2, 1, 3);
    next.prompt = [&first.prompt[..], &answer, &[5, 6, 7]].concat();
    // Of 19 tokens all but the last are computed: four blocks.
    assert_eq!(run(&mut engine, &next).0, 16);
}

#[test]
fn requests_that_run_together_share_blocks() {
    for overlap in [false, true] {
        let scheduler = SchedulerConfig { overlap: Some(overlap), ..config(true).scheduler };
        let mut engine = engine(&EngineConfig { scheduler, ..config(true) }, SLOTS, 64);
        let (mut now, mut outcomes) = (Instant::now(), BTreeMap::new());
        let first = request(1, 41, 20);
        engine.submit(first.clone(), now);
        for _ in 0..3 {
            crate::fake::turn(&mut engine, now, &mut outcomes);
        }
        // 41 + 41 + 41 tokens would not fit at all without sharing.
        let others = [like(2, &first), like(3, &first)];
        others.iter().for_each(|other| engine.submit(other.clone(), now));
        let steps = drain(&mut engine, &mut now, &mut outcomes);
        assert!(steps.iter().any(|step| step.batch.running == 3), "all three ran together");
        assert!(steps.iter().all(|step| step.batch.preempted == 0));
        for other in &others {
            assert_eq!(found(&outcomes[&other.id]), 40);
            assert_eq!(outcomes[&other.id].tokens, reference(other, 64, SLOTS as u32).0);
        }
        assert_eq!(outcomes[&1].tokens, reference(&first, 64, SLOTS as u32).0);
    }
}

#[test]
fn what_was_used_least_recently_goes_first() {
    let mut engine = engine(&config(true), 48, 64);
    let [first, second] = [request(1, 17, 2), request(2, 17, 2)];
    run(&mut engine, &first);
    run(&mut engine, &second);
    // Four blocks each stay; of the twelve, four are free. The first is used again, and then five more are needed.
    assert_eq!(run(&mut engine, &like(3, &first)).0, 16);
    run(&mut engine, &request(4, 18, 2));
    assert_eq!(run(&mut engine, &like(5, &first)).0, 16);
    assert!(run(&mut engine, &like(6, &second)).0 < 16, "the second's last block had to go");
}

#[test]
fn a_preempted_sequence_finds_what_it_had() {
    // Room for one at a time at their longest.
    let requests = [request(1, 16, 30), request(2, 16, 30)];
    let recomputed = |prefix_cache| {
        let mut engine = engine(&config(prefix_cache), 64, 64);
        let (mut now, mut outcomes) = (Instant::now(), BTreeMap::new());
        requests.iter().for_each(|request| engine.submit(request.clone(), now));
        let steps = drain(&mut engine, &mut now, &mut outcomes);
        for request in &requests {
            assert_eq!(outcomes[&request.id].tokens, reference(request, 64, 64).0);
        }
        assert!(steps.iter().any(|step| step.batch.preempted > 0), "the memory was meant to be too small");
        prefilled(&steps)
    };
    assert!(recomputed(true) < recomputed(false));
}

#[test]
fn only_blocks_can_be_shared() {
    let kv = KvLayout::Contiguous { reservation: quire_engine::Reservation::Max };
    let error = EngineConfig { kv, ..config(true) }.validate().unwrap_err().to_string();
    assert!(error.contains("prefix_cache"), "{error}");
}
