//! Speculative decoding over models: outputs are those without it, greedy or not, whatever proposes.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use quire_engine::speculation::{DraftModel, Drafter};
use quire_engine::{
    CpuExecutor, CpuExecutorOptions, DraftLength, DrafterConfig, Engine, EngineConfig, EngineParts, Event,
    KvCapacity, KvLayout, PolicyConfig, Progress, Request, SamplingParams, SchedulerConfig,
    SpeculationConfig,
};

use crate::random_model::{exact_options, golden, load, write_folder};

/// Outputs, and how many proposals were computed, accepted and refused.
type Served = (Vec<Vec<u32>>, [u32; 3]);

fn options(slots: usize) -> CpuExecutorOptions {
    CpuExecutorOptions { kv: KvCapacity::Slots(slots), max_batch_rows: 32, ..exact_options() }
}

fn serve(executor: CpuExecutor, drafter: Option<DrafterConfig>, draft: Option<CpuExecutor>) -> Served {
    let policy = PolicyConfig::Continuous { watermark: 0.0 };
    let length = DraftLength::Fixed { tokens: 3 };
    let config = EngineConfig {
        scheduler: SchedulerConfig { policy, token_budget: 32, max_running: 8, ..SchedulerConfig::default() },
        kv: KvLayout::Paged { block_size: 4 },
        speculation: drafter.map(|drafter| SpeculationConfig { drafter, length }),
        max_model_len: Some(64),
        ..EngineConfig::default()
    };
    let drafter = draft.map(|draft| Box::new(DraftModel::new(Box::new(draft))) as Box<dyn Drafter>);
    let mut engine = Engine::with_parts(executor, &config, EngineParts { policy: None, drafter }).unwrap();
    let requests = 7;
    for id in 0..requests {
        // Greedy ones, drawn ones, and drawn ones with penalties; prompts that repeat themselves.
        let sampling = SamplingParams {
            temperature: if id % 3 == 0 { 0.0 } else { 0.7 },
            repetition_penalty: if id % 3 == 2 { 1.2 } else { 1.0 },
            seed: id,
            ..SamplingParams::default()
        };
        let request = Request {
            id,
            prompt: (0..9 + 3 * id as u32).map(|i| (i % 5) * 7 + id as u32).collect(),
            max_tokens: 28,
            true_output_len: None,
            stop_tokens: Arc::new([]),
            sampling: Arc::new(sampling),
            fork_of: None,
            beam: None,
            priority: 0,
            cache_salt: 0,
        };
        engine.submit(request, Instant::now());
    }
    let mut outputs = vec![Vec::new(); requests as usize];
    let (mut counts, mut preempted) = ([0; 3], 0);
    while engine.has_work() {
        let output = engine.step(Instant::now()).unwrap();
        engine.check_integrity();
        for event in output.events {
            if let Event::Token { id, sampled } = event {
                outputs[id as usize].push(sampled.token);
            }
        }
        if let Progress::Ran(stats) = output.progress {
            let batch = stats.batch;
            let step = [batch.drafted_tokens, batch.accepted_tokens, batch.refused_drafts];
            counts.iter_mut().zip(step).for_each(|(sum, step)| *sum += step);
            preempted += batch.preempted;
        }
    }
    assert!(preempted > 0, "memory is to run short");
    (outputs, counts)
}

fn folder(name: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    write_folder(folder.path(), &golden(name)["config"], 1);
    folder
}

/// What the drafters make of it beside serving without.
fn check(model: &Path, drafter: DrafterConfig, draft: Option<CpuExecutor>) -> [u32; 3] {
    let (expected, none) = serve(load(model, &options(120)), None, None);
    assert!(none == [0; 3] && expected.iter().all(|output| output.len() == 28));
    let (outputs, counts) = serve(load(model, &options(120)), Some(drafter), draft);
    assert_eq!(outputs, expected);
    assert!(counts[0] > 0);
    counts
}

#[test]
fn outputs_are_the_same_with_look_ups() {
    let folder = folder("qwen3");
    let [_, accepted, refused] = check(folder.path(), DrafterConfig::NGram { longest: 3, shortest: 1 }, None);
    assert!(accepted > 0 && refused > 0);
    check(folder.path(), DrafterConfig::Suffix { depth: 8 }, None);
}

#[test]
fn outputs_are_the_same_with_an_early_exit() {
    let folder = folder("llama3");
    let [.., refused] = check(folder.path(), DrafterConfig::EarlyExit { layers: 1 }, None);
    assert!(refused > 0);
}

#[test]
fn outputs_are_the_same_with_a_draft_model() {
    let folder = folder("llama3");
    // Itself: everything is accepted but what memory or the end cut off.
    let [drafted, accepted, refused] =
        check(folder.path(), DrafterConfig::Model {}, Some(load(folder.path(), &options(120))));
    assert!(refused == 0 && accepted > drafted / 2, "{drafted} {accepted} {refused}");
    // A worse one, by its rounding.
    let coarse = CpuExecutorOptions { dtype: quire_engine::model::WeightDtype::Q4_0, ..options(200) };
    let [_, accepted, refused] =
        check(folder.path(), DrafterConfig::Model {}, Some(load(folder.path(), &coarse)));
    assert!(accepted > 0 && refused > 0, "{accepted} {refused}");
}

#[test]
fn a_draft_model_that_does_not_fit_is_refused() {
    let folder = folder("llama3");
    let config = EngineConfig {
        speculation: Some(SpeculationConfig {
            drafter: DrafterConfig::Model {},
            length: DraftLength::Fixed { tokens: 2 },
        }),
        scheduler: SchedulerConfig { token_budget: 32, max_running: 8, ..SchedulerConfig::default() },
        max_model_len: Some(64),
        ..EngineConfig::default()
    };
    let drafter = Box::new(DraftModel::new(Box::new(load(folder.path(), &options(60)))));
    let parts = EngineParts { policy: None, drafter: Some(drafter) };
    let error =
        Engine::with_parts(load(folder.path(), &options(120)), &config, parts).unwrap_err().to_string();
    assert!(error.contains("60 KV slots and needs 120"), "{error}");
}
