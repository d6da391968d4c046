//! Beam search and parallel samples over a model.

use std::sync::Arc;
use std::time::Instant;

use quire_engine::{
    BeamSearch, CpuExecutor, CpuExecutorOptions, EarlyStopping, Engine, EngineConfig, Event, Executor,
    FinishReason, Hypothesis, KvCapacity, KvLayout, ModelExecutor, Parallel, ParallelSamples, Request,
    SamplingParams, SchedulerConfig,
};

use crate::random_model::{exact_options, golden, load, write_folder};

fn model(slots: usize) -> CpuExecutor {
    let folder = tempfile::tempdir().unwrap();
    write_folder(folder.path(), &golden("llama3")["config"], 3);
    let options = CpuExecutorOptions { kv: KvCapacity::Slots(slots), max_batch_rows: 32, ..exact_options() };
    load(folder.path(), &options)
}

fn engine(slots: usize) -> Engine<CpuExecutor> {
    let config = EngineConfig {
        scheduler: SchedulerConfig { token_budget: 32, max_running: 8, ..SchedulerConfig::default() },
        kv: KvLayout::Paged { block_size: 4 },
        ..EngineConfig::default()
    };
    Engine::new(model(slots), &config).unwrap()
}

fn request(max_tokens: u32, sampling: SamplingParams) -> Request {
    Request {
        id: 0,
        prompt: vec![5, 31, 2, 17, 40, 8, 23],
        max_tokens,
        true_output_len: None,
        stop_tokens: Arc::new([]),
        sampling: Arc::new(sampling),
        fork_of: None,
        beam: None,
        priority: 0,
        cache_salt: 0,
    }
}

fn search(slots: usize, max_tokens: u32, width: u32) -> Vec<Hypothesis> {
    let beam = Some(BeamSearch::new(width));
    run(&mut engine(slots), Request { beam, ..request(max_tokens, SamplingParams::default()) })
}

fn run(engine: &mut Engine<CpuExecutor>, request: Request) -> Vec<Hypothesis> {
    engine.submit(request, Instant::now());
    let mut found = Vec::new();
    while engine.has_work() {
        for event in engine.step(Instant::now()).unwrap().events {
            if let Event::Hypotheses { hypotheses, .. } = event {
                found = hypotheses;
            }
        }
        engine.check_integrity();
    }
    found
}

/// Log-probabilities of the token after each of `tokens`.
fn logprobs(executor: &mut CpuExecutor, tokens: &[u32]) -> Vec<Vec<f64>> {
    let vocab = executor.vocab_size();
    let logits = executor.score(tokens).unwrap().into_owned();
    let row = |row: &[f32]| {
        let greatest = row.iter().copied().fold(f32::MIN, f32::max);
        let total: f64 = row.iter().map(|&x| f64::from(x - greatest).exp()).sum();
        row.iter().map(|&x| f64::from(x - greatest) - total.ln()).collect()
    };
    logits.chunks_exact(vocab).map(row).collect()
}

#[test]
fn sums_are_those_of_the_outputs_computed_anew() {
    // Memory for all beams, and for hardly one.
    let plenty = search(256, 9, 4);
    assert_eq!(plenty, search(20, 9, 4));
    let mut executor = model(64);
    let prompt = request(1, SamplingParams::default()).prompt;
    for found in &plenty {
        let rows = logprobs(&mut executor, &[&prompt[..], &found.tokens].concat());
        let places = prompt.len() - 1..;
        let sum: f64 = places.zip(&found.tokens).map(|(at, &token)| rows[at][token as usize]).sum();
        assert!((sum - found.logprob).abs() < 1e-3, "{sum} and {}", found.logprob);
        assert!((found.score - found.logprob / 9.0).abs() < 1e-9);
    }
}

/// `scripts/golden_logits.py beams`: widths, penalties, rules of stopping, and no, one or three tokens that end an output.
#[test]
fn transformers_finds_the_same() {
    let golden = golden("beams");
    let numbers = |value: &serde_json::Value| -> Vec<u32> { serde_json::from_value(value.clone()).unwrap() };
    let mut engine = engine(512);
    let (mut searches, mut stopped) = (0, 0);
    for case in golden["found"].as_array().unwrap() {
        let beam = BeamSearch {
            width: case["width"].as_u64().unwrap() as u32,
            length_penalty: case["penalty"].as_f64().unwrap() as f32,
            early_stopping: match case["early"].as_str().unwrap() {
                "true" => EarlyStopping::Always,
                "false" => EarlyStopping::Unlikely,
                _ => EarlyStopping::Impossible,
            },
        };
        let asked = Request {
            prompt: numbers(&golden["prompt"]),
            beam: Some(beam),
            stop_tokens: numbers(&case["ends"]).into(),
            ..request(golden["max_new_tokens"].as_u64().unwrap() as u32, SamplingParams::default())
        };
        let found = run(&mut engine, asked);
        let expected = case["outputs"].as_array().unwrap();
        assert_eq!(found.len(), expected.len(), "{beam:?}");
        for (found, expected) in found.iter().zip(expected) {
            assert_eq!(found.tokens, numbers(&expected["tokens"]), "{beam:?}, ends {}", case["ends"]);
            let score = expected["score"].as_f64().unwrap();
            assert!((found.score - score).abs() < 1e-3 * score.abs().max(1.0), "{} and {score}", found.score);
            stopped += u32::from(found.reason == FinishReason::Stop);
        }
        searches += 1;
    }
    assert!(searches == 108 && stopped > 50, "{stopped} outputs of {searches} searches end by a token");
}

#[test]
fn of_all_pairs_of_tokens_the_best_are_found() {
    let mut executor = model(64);
    let prompt = request(1, SamplingParams::default()).prompt;
    let first = logprobs(&mut executor, &prompt).pop().unwrap();
    let mut pairs = Vec::new();
    for (token, so_far) in (0..).zip(&first) {
        let second = logprobs(&mut executor, &[&prompt[..], &[token]].concat()).pop().unwrap();
        pairs.extend((0..).zip(second).map(|(next, logprob)| (so_far + logprob, vec![token, next])));
    }
    pairs.sort_by(|a, b| b.0.total_cmp(&a.0));
    let found = search(256, 2, 16);
    for (found, (_, tokens)) in found.iter().take(4).zip(&pairs) {
        assert_eq!(&found.tokens, tokens);
    }
}

#[test]
fn the_best_samples_are_returned_and_share_their_prompt() {
    let drawn = request(12, SamplingParams { temperature: 1.0, seed: 4, ..SamplingParams::default() });
    let parallel = Parallel { n: 2, best_of: 5 };
    let requests = parallel
        .requests(drawn.clone(), {
            let mut id = 0;
            move || {
                id += 1;
                id
            }
        })
        .unwrap();
    let mut samples = ParallelSamples::new(parallel, &requests);
    let mut all = ParallelSamples::new(Parallel { n: 5, best_of: 5 }, &requests);
    let mut engine = engine(256);
    requests.iter().for_each(|request| engine.submit(request.clone(), Instant::now()));
    let mut cached = Vec::new();
    while !samples.is_finished() {
        for event in engine.step(Instant::now()).unwrap().events {
            assert_eq!(samples.observe(&event), all.observe(&event));
            if let Event::Finished { cached_tokens, .. } = event {
                cached.push(cached_tokens);
            }
        }
    }
    cached.sort();
    assert_eq!(cached, [0, 6, 6, 6, 6]);
    let (best, all) = (samples.into_best().unwrap(), all.into_best().unwrap());
    let mut ranked: Vec<f64> = all.iter().map(|sample| sample.logprob / 12.0).collect();
    ranked.sort_by(|a, b| b.total_cmp(a));
    assert_eq!(best.iter().map(|sample| sample.logprob / 12.0).collect::<Vec<_>>(), ranked[..2]);
    assert!((1..5).all(|i| all[i].tokens != all[0].tokens), "seeds differ");
    // The first is what the request alone gets.
    let mut alone = ParallelSamples::new(Parallel { n: 1, best_of: 1 }, std::slice::from_ref(&drawn));
    engine.submit(drawn, Instant::now());
    while !alone.is_finished() {
        engine.step(Instant::now()).unwrap().events.iter().for_each(|event| _ = alone.observe(event));
    }
    assert_eq!(alone.into_best().unwrap()[0].tokens, all[0].tokens);
    assert!(Parallel { n: 3, best_of: 2 }.validate().unwrap_err().contains("fewer than the 3"));
}
