//! Batching without chunked prefill: prompts alone, before decodes.

use std::collections::BTreeMap;
use std::time::Instant;

use quire_engine::{EngineConfig, KvLayout, PolicyConfig, Progress, SchedulerConfig};

use crate::fake::{drain, engine, reference, request, turn};

fn config(token_budget: u32) -> EngineConfig {
    let scheduler = SchedulerConfig {
        policy: PolicyConfig::PrefillFirst { watermark: 0.0 },
        token_budget,
        ..SchedulerConfig::default()
    };
    EngineConfig { scheduler, kv: KvLayout::Paged { block_size: 4 }, ..EngineConfig::default() }
}

#[test]
fn a_prompt_goes_before_decodes_and_alone() {
    let mut engine = engine(&config(32), 256, 64);
    let (mut now, mut outcomes) = (Instant::now(), BTreeMap::new());
    let rows = |progress: Progress| match progress {
        Progress::Ran(step) => (step.batch.prefill_tokens, step.batch.decode_tokens),
        other => panic!("{other:?}"),
    };
    engine.submit(request(1, 10, 8), now);
    engine.submit(request(2, 20, 8), now);
    assert_eq!(rows(turn(&mut engine, now, &mut outcomes)), (30, 0), "both fit in one step");
    assert_eq!(rows(turn(&mut engine, now, &mut outcomes)), (0, 2));
    engine.submit(request(3, 31, 8), now);
    engine.submit(request(4, 2, 8), now);
    assert_eq!(rows(turn(&mut engine, now, &mut outcomes)), (31, 0), "a prompt is not split to fill a step");
    assert_eq!(rows(turn(&mut engine, now, &mut outcomes)), (2, 0));
    assert_eq!(rows(turn(&mut engine, now, &mut outcomes)), (0, 4));
    let steps = drain(&mut engine, &mut now, &mut outcomes);
    assert!(steps.iter().all(|step| step.batch.prefill_tokens == 0));
    for (id, prompt) in [(1, 10), (2, 20), (3, 31), (4, 2)] {
        assert_eq!(outcomes[&id].tokens, reference(&request(id, prompt, 8), 64, 256).0);
    }
}

#[test]
fn a_prompt_longer_than_a_step_is_computed_over_several() {
    let mut engine = engine(&config(16), 256, 64);
    let (mut now, mut outcomes) = (Instant::now(), BTreeMap::new());
    engine.submit(request(1, 5, 20), now);
    turn(&mut engine, now, &mut outcomes);
    engine.submit(request(2, 40, 3), now);
    let steps = drain(&mut engine, &mut now, &mut outcomes);
    let first: Vec<_> = steps[..3].iter().map(|s| (s.batch.prefill_tokens, s.batch.decode_tokens)).collect();
    assert_eq!(first, [(16, 0), (16, 0), (8, 0)]);
    assert_eq!(outcomes[&2].tokens, reference(&request(2, 40, 3), 64, 256).0);
}

#[test]
fn decodes_go_on_when_no_prompt_fits_in_memory() {
    let mut engine = engine(&config(32), 32, 64);
    let (mut now, mut outcomes) = (Instant::now(), BTreeMap::new());
    engine.submit(request(1, 15, 10), now);
    engine.submit(request(2, 15, 10), now);
    let steps = drain(&mut engine, &mut now, &mut outcomes);
    assert!(steps.iter().all(|step| step.batch.prefill_tokens == 0 || step.batch.decode_tokens == 0));
    for id in [1, 2] {
        assert_eq!(outcomes[&id].tokens, reference(&request(id, 15, 10), 64, 32).0);
    }
}
