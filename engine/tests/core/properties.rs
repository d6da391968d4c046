//! Random workloads under random settings: every request ends, the books balance at every step, and tokens are those
//! of a sequence computed alone.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use quire_engine::policy::{Plan, SchedulerPolicy, SchedulerView};
use quire_engine::speculation::Drafter;
use quire_engine::{
    BeamSearch, DraftLength, DrafterConfig, EarlyStopping, Engine, EngineConfig, EngineParts, Event,
    FinishReason, KvLayout, PolicyConfig, PreemptionConfig, Progress, Request, Reservation, SamplingParams,
    SchedulerConfig, SpeculationConfig,
};

use crate::beams;
use crate::fake::{Fake, Outcome, reference, request, turn};
use crate::random_policy::Random;
use crate::speculation::Knowing;

const MAX_MODEL_LEN: u32 = 64;

/// A request, the step before which it arrives, and the step before which it is cancelled, if it is.
#[derive(Debug, Clone)]
struct Arrival {
    request: Request,
    at: u32,
    cancel: Option<u32>,
}

/// Prompt and output lengths, true length, first stop token, whether penalized, steps of arrival and cancellation, beams.
type Drawn = (u32, u32, Option<u32>, Option<u32>, bool, u32, Option<u32>, Option<u32>);

fn arrivals() -> impl Strategy<Value = Vec<Arrival>> {
    let one = (
        1_u32..70,
        prop_oneof![4 => 0_u32..30, 1 => Just(u32::MAX)],
        prop::option::weighted(0.7, 0_u32..40),
        prop::option::weighted(0.2, 0_u32..1000),
        any::<bool>(),
        0_u32..60,
        prop::option::weighted(0.15, 0_u32..80),
        prop::option::weighted(0.15, 1_u32..=5),
    );
    prop::collection::vec(one, 1..24).prop_map(|all| {
        let build =
            |id: u64, (prompt, max_tokens, true_output_len, stop, penalty, at, cancel, width): Drawn| {
                let frequency_penalty = if penalty && width.is_none() { 0.1 } else { 0.0 };
                let early = [EarlyStopping::Always, EarlyStopping::Unlikely, EarlyStopping::Impossible];
                let search = |width: u32| BeamSearch {
                    width,
                    length_penalty: prompt as f32 % 4.0 - 1.0,
                    early_stopping: early[prompt as usize % 3],
                };
                let request = Request {
                    true_output_len,
                    stop_tokens: stop.map_or_else(Vec::new, |token| (token..token + 30).collect()).into(),
                    sampling: Arc::new(SamplingParams { frequency_penalty, ..SamplingParams::default() }),
                    // Some begin alike, and some of those may share what they have in common.
                    prompt: request(id % 5, prompt, 1).prompt,
                    fork_of: None,
                    beam: width.map(search),
                    priority: (id % 3) as u8,
                    cache_salt: id % 2,
                    ..request(id, prompt, max_tokens)
                };
                Arrival { request, at, cancel }
            };
        let mut arrivals: Vec<Arrival> = (0..).zip(all).map(|(id, drawn)| build(id, drawn)).collect();
        // Some are further samples of the prompt before them; a few come before that one and are on their own.
        for id in 1..arrivals.len() {
            if (arrivals[id].at + arrivals[id - 1].at).is_multiple_of(3) {
                let first = arrivals[id - 1].request.clone();
                let request = &mut arrivals[id].request;
                if first.beam.is_some() || request.beam.is_some() {
                    continue;
                }
                (request.prompt, request.cache_salt) = (first.prompt, first.cache_salt);
                request.fork_of = Some(first.fork_of.unwrap_or(first.id));
            }
        }
        arrivals
    })
}

/// What policies' settings are made of.
#[derive(Debug, Clone, Copy)]
struct PolicyDraw {
    watermark: f64,
    batch_size: u32,
    millis: u64,
}

/// A policy with settings as they are drawn.
type Policy = fn(PolicyDraw) -> PolicyConfig;

const CONTINUOUS: Policy = |drawn| PolicyConfig::Continuous { watermark: drawn.watermark };
const PREFILL_FIRST: Policy = |drawn| PolicyConfig::PrefillFirst { watermark: drawn.watermark };
const PRIORITY: Policy = |drawn| by_class(drawn, true);
const UNCHUNKED: Policy = |drawn| by_class(drawn, false);
const STATIC: Policy =
    |drawn| PolicyConfig::Static { batch_size: drawn.batch_size, timeout_ms: drawn.millis };

/// All policies. Static batching is drawn as often as the others together: it has most rules of its own.
const POLICIES: [Policy; 8] =
    [CONTINUOUS, PREFILL_FIRST, PRIORITY, UNCHUNKED, STATIC, STATIC, STATIC, STATIC];

fn by_class(drawn: PolicyDraw, chunked: bool) -> PolicyConfig {
    PolicyConfig::Priority { watermark: drawn.watermark, aging_ms: drawn.millis, chunked }
}

/// Settings that are valid together, and the KV slots.
fn settings() -> impl Strategy<Value = (EngineConfig, usize)> {
    let layout = prop_oneof![
        3 => prop_oneof![1_u32..=20, 1_u32..=256].prop_map(|block_size| KvLayout::Paged { block_size }),
        1 => Just(KvLayout::Contiguous { reservation: Reservation::Max }),
        1 => Just(KvLayout::Contiguous { reservation: Reservation::Pow2 }),
        1 => Just(KvLayout::Contiguous { reservation: Reservation::Oracle }),
    ];
    let scheduler = (prop_oneof![1_u32..10, 10_u32..120], 1_u32..12, 0.0..0.5, 1_u32..9, 0_u64..30);
    let slots = prop_oneof![0_usize..40, 0_usize..400];
    let switches =
        (any::<[bool; 3]>(), 0..POLICIES.len(), prop::option::of(1_u32..9), prop::option::of(1_u64..300));
    (layout, scheduler, switches, slots).prop_map(|(kv, scheduler, switches, extra)| {
        let ([overlap, prefix_cache, share_blocks], policy, drafts, swap) = switches;
        let is_paged = matches!(kv, KvLayout::Paged { .. });
        let (token_budget, max_running, watermark, batch_size, millis) = scheduler;
        let watermark = if is_paged { watermark } else { 0.0 };
        let batch_size = batch_size.min(max_running).min(token_budget);
        let policy = POLICIES[policy](PolicyDraw { watermark, batch_size, millis });
        let fixed = matches!(policy, PolicyConfig::Static { .. });
        let least = match kv {
            KvLayout::Paged { block_size } => block_size,
            KvLayout::Contiguous { reservation: Reservation::Max } => MAX_MODEL_LEN,
            KvLayout::Contiguous { .. } => 1,
        };
        let length = drafts.filter(|_| !fixed).map(|most| match most % 2 {
            0 => DraftLength::Fixed { tokens: most },
            _ => DraftLength::Adaptive { most },
        });
        let speculation =
            length.map(|length| SpeculationConfig { drafter: DrafterConfig::External {}, length });
        let overlap = speculation.is_none().then_some(overlap);
        let scheduler = SchedulerConfig { policy, token_budget, max_running, max_waiting: 1000, overlap };
        let (prefix_cache, share_blocks) = (prefix_cache && is_paged, share_blocks || !is_paged);
        let swap = swap.filter(|_| !fixed);
        let preemption =
            swap.map_or(PreemptionConfig::Recompute {}, |bytes| PreemptionConfig::Swap { bytes });
        let config = EngineConfig {
            scheduler,
            kv,
            prefix_cache,
            share_blocks,
            preemption,
            speculation,
            max_model_len: None,
        };
        (config, least as usize + extra)
    })
}

/// The most slots one sequence can have.
fn largest(kv: KvLayout, slots: usize) -> u32 {
    match kv {
        KvLayout::Paged { block_size } => slots as u32 / block_size * block_size,
        KvLayout::Contiguous { .. } => 1 << slots.ilog2(),
    }
}

/// What one sequence needs at least to be taken.
fn needed(kv: KvLayout, request: &Request) -> u32 {
    let prompt = request.prompt.len() as u32;
    let output = request.true_output_len.unwrap_or(u32::MAX).min(request.max_tokens);
    let reserve = |output: u64| (u64::from(prompt) + output).min(u64::from(MAX_MODEL_LEN)) as u32;
    match kv {
        KvLayout::Paged { .. } => prompt,
        KvLayout::Contiguous { reservation: Reservation::Max } => MAX_MODEL_LEN,
        KvLayout::Contiguous { reservation: Reservation::Pow2 } => {
            reserve(u64::from(output).next_power_of_two())
        }
        KvLayout::Contiguous { reservation: Reservation::Oracle } => reserve(u64::from(output)),
    }
}

/// Runs a workload to its end, under the configured policy or one from outside.
fn run(
    config: &EngineConfig,
    slots: usize,
    arrivals: &[Arrival],
    policy: Option<Box<dyn SchedulerPolicy>>,
) -> BTreeMap<u64, Outcome> {
    let rows = config.scheduler.token_budget as usize;
    // Little more rows of logits than sequences, by chance.
    let logit_rows = rows.min(config.scheduler.max_running as usize + slots % 5);
    let fake = Fake { logit_rows, ..Fake::new(slots, MAX_MODEL_LEN as usize, rows) };
    // Right three times out of four.
    let drafter = config.speculation.as_ref().map(|_| Box::new(Knowing::new(4)) as Box<dyn Drafter>);
    let mut engine =
        Engine::with_parts(fake, config, EngineParts { policy, drafter }).expect("the settings are valid");
    let mut outcomes = BTreeMap::new();
    let mut now = Instant::now();
    let mut step = 0;
    while step < 100 || engine.has_work() {
        for arrival in arrivals.iter().filter(|arrival| arrival.at == step) {
            engine.submit(arrival.request.clone(), now);
        }
        for arrival in arrivals.iter().filter(|arrival| arrival.cancel == Some(step)) {
            engine.cancel(arrival.request.id);
        }
        match turn(&mut engine, now, &mut outcomes) {
            Progress::Ran(stats) => {
                let batch = &stats.batch;
                let rows =
                    batch.prefill_tokens + batch.decode_tokens + batch.drafted_tokens + batch.padding_tokens;
                assert!(rows <= config.scheduler.token_budget);
                assert_eq!(stats.batch.kv.total(), total(config.kv, slots));
            }
            Progress::Began => assert_eq!(config.scheduler.overlap, Some(true)),
            Progress::Idle { until } => {
                assert!(engine.alive() == 0 || until.is_some(), "stands still with {engine:?}");
            }
        }
        now += Duration::from_millis(1);
        step += 1;
        assert!(step < 100_000, "no end: {engine:?}");
    }
    outcomes
}

/// Two policies that are to plan the same, but for the order of rows.
struct Same([Box<dyn SchedulerPolicy>; 2]);

impl SchedulerPolicy for Same {
    fn plan(&mut self, view: &SchedulerView<'_>, plan: &mut Plan) {
        let mut other = Plan::default();
        self.0[0].plan(view, plan);
        self.0[1].plan(view, &mut other);
        plan.run.sort_unstable();
        other.run.sort_unstable();
        assert_eq!(other, *plan);
    }
}

fn total(kv: KvLayout, slots: usize) -> u64 {
    match kv {
        KvLayout::Paged { .. } => u64::from(largest(kv, slots)),
        KvLayout::Contiguous { .. } => slots as u64,
    }
}

fn check(config: &EngineConfig, slots: usize, arrival: &Arrival, outcome: Option<&Outcome>, is_random: bool) {
    let Arrival { request, at, cancel } = arrival;
    let outcome = outcome.expect("every request is heard of");
    let largest = largest(config.kv, slots);
    let runs = request.beam.is_none()
        || !matches!(config.scheduler.policy, PolicyConfig::Static { .. })
        || is_random;
    let fits = runs && request.prompt.len() < MAX_MODEL_LEN as usize && needed(config.kv, request) <= largest;
    if request.beam.is_some()
        && let Some(Event::Finished { reason, .. }) = outcome.end
        && request.max_tokens > 0
        && request.true_output_len != Some(0)
    {
        assert!(fits && reason == outcome.hypotheses[0].reason && outcome.tokens.is_empty());
        let found = outcome.hypotheses.iter().map(|found| (found.tokens.clone(), found.reason));
        assert_eq!(found.collect::<Vec<_>>(), beams::search(request, MAX_MODEL_LEN, largest));
        return;
    }
    let (tokens, reason) = if request.max_tokens == 0 {
        (Vec::new(), FinishReason::Length)
    } else if request.true_output_len == Some(0) {
        (Vec::new(), FinishReason::Stop)
    } else {
        reference(request, MAX_MODEL_LEN, largest)
    };
    match outcome.end.as_ref().expect("every request ends") {
        Event::Rejected { reason, .. } => assert!(!fits, "rejected though it fits: {reason}"),
        Event::Finished { reason: got, .. } => {
            assert!(fits && *got == reason, "{got:?}, not {reason:?}");
            assert_eq!(outcome.tokens, tokens);
        }
        Event::Cancelled { .. } => {
            assert!(fits && cancel.is_some_and(|cancel| cancel >= *at));
            assert!(tokens.starts_with(&outcome.tokens));
        }
        Event::Token { .. } | Event::Hypotheses { .. } => unreachable!("a token is no end"),
    }
}

proptest! {
    // PROPTEST_CASES asks for more.
    #![proptest_config(ProptestConfig {
        cases: ProptestConfig::default().cases.max(4000),
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn every_request_ends_and_tokens_do_not_depend_on_the_settings(
        (config, slots) in settings(),
        arrivals in arrivals(),
    ) {
        let outcomes = run(&config, slots, &arrivals, None);
        prop_assert_eq!(outcomes.len(), arrivals.len());
        for arrival in &arrivals {
            check(&config, slots, arrival, outcomes.get(&arrival.request.id), false);
        }
    }

    #[test]
    fn a_random_policy_breaks_nothing(
        (config, slots) in settings(),
        arrivals in arrivals(),
        seed in any::<u64>(),
    ) {
        let outcomes = run(&config, slots, &arrivals, Some(Box::new(Random::new(seed))));
        for arrival in &arrivals {
            check(&config, slots, arrival, outcomes.get(&arrival.request.id), true);
        }
    }

    /// An engine without classes is one with a single class: what turns classes off turns off nothing else. Prompts that go first
    /// do so without aging here, which bounds how long decodes wait for them and which `prefill_first` does not have.
    #[test]
    fn priority_plans_as_the_policies_without_classes_where_there_is_one(
        (config, slots) in settings(),
        mut arrivals in arrivals(),
        watermark in 0.0..0.5,
        millis in 0_u64..30,
    ) {
        arrivals.iter_mut().for_each(|arrival| arrival.request.priority = 0);
        let drawn = PolicyDraw { watermark, batch_size: 0, millis };
        let ageless = PolicyDraw { millis: 0, ..drawn };
        for (pair, drawn) in [([CONTINUOUS, PRIORITY], drawn), ([PREFILL_FIRST, UNCHUNKED], ageless)] {
            let policies = pair.map(|policy| policy(drawn).build().unwrap());
            run(&config, slots, &arrivals, Some(Box::new(Same(policies))));
        }
    }
}
