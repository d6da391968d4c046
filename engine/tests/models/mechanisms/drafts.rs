//! A draft model that is another one than the target: many of its proposals are refused.

use quire_engine::speculation::{DraftModel, Drafter};
use quire_engine::{
    DraftLength, DrafterConfig, EngineConfig, Executor, ModelExecutor, PolicyConfig, Request,
};

use super::{PLENTY, TIGHT, forks, nothing, serve, swap, with_drafter, with_policy, workload};

/// Serves with proposals of the models that `draft` loads; how many tokens were accepted, and sequences refused some.
pub(super) fn check<E: ModelExecutor, D: Executor + 'static>(
    new: impl Fn(usize) -> E,
    draft: impl Fn(usize) -> D,
) -> [u32; 2] {
    let [mut plenty, mut tight] = [PLENTY, TIGHT].map(|slots| Some(new(slots)));
    let mut run = |slots: usize, config: &EngineConfig, requests: &[Request]| {
        let executor = if slots == TIGHT { &mut tight } else { &mut plenty };
        let drafter = config.speculation.as_ref().map(|_| {
            // Each request's tokens lie in the same slots of both.
            Box::new(DraftModel::new(Box::new(draft(slots)))) as Box<dyn Drafter>
        });
        let (served, back) = serve(executor.take().expect("given back"), config, drafter, requests);
        *executor = Some(back);
        served
    };
    let mut sums = [0; 2];
    for (what, requests) in [("requests", workload()), ("forks", forks())] {
        let without_sharing: Vec<_> =
            requests.iter().map(|request| Request { fork_of: None, ..request.clone() }).collect();
        let expected = run(PLENTY, &nothing(), &without_sharing).outputs;
        for length in [DraftLength::Fixed { tokens: 3 }, DraftLength::Adaptive { most: 4 }] {
            let plain = with_drafter(DrafterConfig::Model {}, length);
            let cached = EngineConfig { prefix_cache: true, ..plain.clone() };
            let swapping = EngineConfig { preemption: swap(), ..plain.clone() };
            let policy = PolicyConfig::Priority { watermark: 0.0, aging_ms: 10_000, chunked: true };
            let scheduler = with_policy(policy).scheduler;
            let all = EngineConfig { scheduler, preemption: swap(), ..cached.clone() };
            for (name, slots, config) in [
                ("alone", PLENTY, &plain),
                ("with preemption by recomputation", TIGHT, &plain),
                ("with the prefix cache", PLENTY, &cached),
                ("with preemption by swap", TIGHT, &swapping),
                ("with classes, the cache and swap", TIGHT, &all),
            ] {
                let served = run(slots, config, &requests);
                println!("{name}, {length:?}, {what}: {served:?}");
                assert_eq!(served.outputs, expected, "{name}, {length:?}, {what}");
                assert!(served.drafted > 0 && served.refused > 0, "{name}, {length:?}: nothing was refused");
                assert!(!config.prefix_cache || served.cached() > 0, "{name}: nothing was cached");
                assert!(slots != TIGHT || served.preempted > 0, "{name}: nothing was preempted");
                assert!(slots != TIGHT || config.preemption.is_default() || served.swapped > 0, "{name}");
                sums[0] += served.accepted;
                sums[1] += served.refused;
            }
        }
    }
    sums
}
