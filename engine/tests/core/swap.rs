//! Preemption by swapping: nothing is computed twice, and what finds no room is.

use std::collections::BTreeMap;
use std::time::Instant;

use quire_engine::{EngineConfig, Event, KvLayout, PolicyConfig, PreemptionConfig, Request, SchedulerConfig};

use crate::fake::{drain, engine, reference, request, serve, sum, turn};

const SLOTS: usize = 64;

fn config(bytes: Option<u64>, overlap: bool) -> EngineConfig {
    let policy = PolicyConfig::Continuous { watermark: 0.0 };
    let preemption = bytes.map_or(PreemptionConfig::Recompute {}, |bytes| PreemptionConfig::Swap { bytes });
    EngineConfig {
        scheduler: SchedulerConfig {
            policy,
            token_budget: 64,
            overlap: Some(overlap),
            ..SchedulerConfig::default()
        },
        kv: KvLayout::Paged { block_size: 4 },
        preemption,
        ..EngineConfig::default()
    }
}

#[test]
fn what_is_swapped_is_not_computed_again() {
    let requests: Vec<Request> = (0..5).map(|id| request(id, 9, 30)).collect();
    let prompts = 5 * 9;
    let check = |bytes, overlap| {
        let (outcomes, steps) = serve(engine(&config(bytes, overlap), SLOTS, 64), &requests);
        for asked in &requests {
            assert_eq!(outcomes[&asked.id].tokens, reference(asked, 64, SLOTS as u32).0);
        }
        let computed = sum(&steps, |s| s.batch.prefill_tokens);
        let [out, back] = [sum(&steps, |s| s.batch.swapped_out), sum(&steps, |s| s.batch.swapped_in)];
        (sum(&steps, |s| s.batch.preempted), computed - prompts, out, back)
    };
    for overlap in [false, true] {
        let (preempted, again, out, _) = check(None, overlap);
        assert!(preempted > 0 && again > 0 && out == 0);
        let (preempted, again, out, back) = check(Some(1000), overlap);
        assert!(preempted > 0 && again == 0 && out > 0 && back == out, "{preempted} {again} {out} {back}");
        // Two blocks of 16 hold no sequence of more than 32 tokens, and not two of fewer at once.
        let (_, again, out, back) = check(Some(32), overlap);
        assert!(again > 0 && out > 0 && back == out, "{again} {out} {back}");
    }
}

#[test]
fn who_is_cancelled_while_swapped_out_leaves_nothing() {
    let mut engine = engine(&config(Some(1000), false), SLOTS, 64);
    let (mut now, mut outcomes) = (Instant::now(), BTreeMap::new());
    (0..4).for_each(|id| engine.submit(request(id, 13, 30), now));
    // The last is preempted when the others' fourth blocks are full.
    while engine.executor().host.iter().all(|&(token, _)| token == u32::MAX) {
        turn(&mut engine, now, &mut outcomes);
    }
    // `turn` counts the swap space's blocks against their owners.
    engine.cancel(3);
    turn(&mut engine, now, &mut outcomes);
    assert!(matches!(outcomes[&3].end, Some(Event::Cancelled { .. })));
    drain(&mut engine, &mut now, &mut outcomes);
    assert_eq!(outcomes[&0].tokens.len(), 30);
}

#[test]
fn no_room_at_all_is_refused() {
    let error = config(Some(0), false).validate().unwrap_err().to_string();
    assert!(error.contains("preemption.bytes is 0"), "{error}");
}
