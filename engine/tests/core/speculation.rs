//! Speculative decoding over the fake executor: what is proposed, accepted and given back.

use std::collections::BTreeMap;
use std::time::Instant;

use quire_engine::speculation::{DraftContext, DraftModel, DraftTarget, Drafter};
use quire_engine::{
    DraftLength, DrafterConfig, Engine, EngineConfig, EngineError, EngineParts, Event, Executor, KvLayout,
    PolicyConfig, Progress, Request, SamplingParams, ScheduledBatch, SchedulerConfig, SpeculationConfig,
};

use crate::fake::{Fake, VOCAB, drain, next_token, reference, request, serve, spoil, sum, turn};

/// Proposes what the fake executor will sample, but for one proposal in `wrong` (none when 0).
pub(crate) struct Knowing {
    wrong: u32,
    /// Whether proposals are placeholders until the batch is known.
    late: bool,
}

impl Knowing {
    pub(crate) fn new(wrong: u32) -> Self {
        Self { wrong, late: false }
    }

    fn next(&self, history: &[u32]) -> u32 {
        spoil(next_token(history), history.len(), self.wrong)
    }
}

impl Drafter for Knowing {
    fn propose(&mut self, context: DraftContext<'_>, most: u32, drafts: &mut Vec<u32>) {
        let mut history = context.tokens.to_vec();
        for _ in 0..most {
            let token = self.next(&history);
            history.push(token);
            drafts.push(if self.late { 0 } else { token });
        }
    }

    fn complete(&mut self, _: &mut dyn Executor, batch: &mut ScheduledBatch) -> Result<(), EngineError> {
        if self.late {
            for span in batch.drafts.clone() {
                let mut history = batch.sampling[span.sample as usize].history.clone();
                for index in 0..span.drafted {
                    let token = self.next(&history);
                    history.push(token);
                    batch.tokens[(span.row + 1 + index) as usize] = token;
                    for row in &mut batch.sampling[(span.sample + index + 1) as usize..]
                        [..(span.drafted - index) as usize]
                    {
                        row.history[history.len() - 1] = token;
                    }
                }
            }
        }
        Ok(())
    }
}

fn config(drafter: DrafterConfig, tokens: u32) -> EngineConfig {
    let policy = PolicyConfig::Continuous { watermark: 0.0 };
    EngineConfig {
        scheduler: SchedulerConfig { policy, token_budget: 32, ..SchedulerConfig::default() },
        kv: KvLayout::Paged { block_size: 4 },
        speculation: Some(SpeculationConfig { drafter, length: DraftLength::Fixed { tokens } }),
        ..EngineConfig::default()
    }
}

fn engine(config: &EngineConfig, drafter: Option<Knowing>, slots: usize) -> Engine<Fake> {
    let drafter = drafter.map(|drafter| Box::new(drafter) as Box<dyn Drafter>);
    let fake = Fake::new(slots, 64, config.scheduler.token_budget as usize);
    Engine::with_parts(fake, config, EngineParts { policy: None, drafter }).unwrap()
}

#[test]
fn what_is_known_comes_several_at_a_time() {
    let asked = request(1, 5, 13);
    let (outcomes, steps) = serve(
        engine(&config(DrafterConfig::External {}, 3), Some(Knowing::new(0)), 64),
        std::slice::from_ref(&asked),
    );
    assert_eq!(outcomes[&1].tokens, reference(&asked, 64, 64).0);
    // One after the prompt, then three times three proposals and the token after them.
    assert_eq!(steps.len(), 4);
    assert_eq!((sum(&steps, |s| s.batch.drafted_tokens), sum(&steps, |s| s.batch.accepted_tokens)), (9, 9));
    assert_eq!(sum(&steps, |s| s.batch.decode_tokens), 3);
}

#[test]
fn what_is_refused_costs_rows_and_is_given_back() {
    // The 5 tokens of the prompt and the first output take 2 blocks; 7 proposals take 2 more.
    let asked = request(1, 5, 20);
    let mut engine = engine(&config(DrafterConfig::External {}, 7), Some(Knowing::new(1)), 64);
    let (now, mut outcomes) = (Instant::now(), BTreeMap::new());
    engine.submit(asked.clone(), now);
    turn(&mut engine, now, &mut outcomes);
    let progress = turn(&mut engine, now, &mut outcomes);
    let quire_engine::Progress::Ran(stats) = progress else { panic!("{progress:?}") };
    assert_eq!(
        (stats.batch.drafted_tokens, stats.batch.accepted_tokens, stats.batch.refused_drafts),
        (7, 0, 1)
    );
    assert_eq!(stats.batch.kv.free, 64 - 16);
    // The next step finds them free again, and takes them for new proposals.
    let progress = turn(&mut engine, now, &mut outcomes);
    let quire_engine::Progress::Ran(stats) = progress else { panic!("{progress:?}") };
    assert_eq!(stats.batch.kv.free, 64 - 16);
    drain(&mut engine, &mut now.clone(), &mut outcomes);
    assert_eq!(outcomes[&1].tokens, reference(&asked, 64, 64).0);
}

#[test]
fn no_decode_waits_for_a_proposal() {
    // 8 rows for 8 sequences: none is left for proposals.
    let requests: Vec<Request> = (0..8).map(|id| request(id, 4, 30)).collect();
    let mut settings = config(DrafterConfig::External {}, 4);
    settings.scheduler.token_budget = 8;
    let (outcomes, steps) = serve(engine(&settings, Some(Knowing::new(0)), 300), &requests);
    for asked in &requests {
        assert_eq!(outcomes[&asked.id].tokens, reference(asked, 64, 300).0);
    }
    let full: Vec<_> = steps.iter().filter(|s| s.batch.decode_tokens == 8).collect();
    assert!(!full.is_empty() && full.iter().all(|s| s.batch.drafted_tokens == 0));
    // Memory for all and little more: nobody is preempted for proposals.
    let settings = config(DrafterConfig::External {}, 4);
    let (_, steps) = serve(engine(&settings, Some(Knowing::new(0)), 288), &requests);
    assert_eq!(sum(&steps, |s| s.batch.preempted), 0);
    assert!(sum(&steps, |s| s.batch.accepted_tokens) > 0);
}

#[test]
fn rows_of_logits_are_left_for_those_whose_prompts_end() {
    // Requests come while others decode, and no more rows of logits are there than may run.
    let mut settings = config(DrafterConfig::External {}, 4);
    settings.scheduler = SchedulerConfig { token_budget: 64, max_running: 6, ..settings.scheduler };
    let parts = EngineParts { policy: None, drafter: Some(Box::new(Knowing::new(0))) };
    let fake = Fake { logit_rows: 6, ..Fake::new(400, 64, 64) };
    let mut engine = Engine::with_parts(fake, &settings, parts).unwrap();
    let (mut now, mut outcomes) = (Instant::now(), BTreeMap::new());
    let requests: Vec<Request> = (0..12).map(|id| request(id, 3, 20)).collect();
    let mut drafted = 0;
    for asked in &requests {
        engine.submit(asked.clone(), now);
        for _ in 0..3 {
            if let Progress::Ran(step) = turn(&mut engine, now, &mut outcomes) {
                drafted += step.batch.drafted_tokens;
            }
        }
    }
    drain(&mut engine, &mut now, &mut outcomes);
    assert!(drafted > 0, "there are rows to spare at first");
    for asked in &requests {
        assert_eq!(outcomes[&asked.id].tokens, reference(asked, 64, 400).0);
    }
}

#[test]
fn proposals_may_be_made_when_the_batch_is_known() {
    // With it rows have the whole text, which this drafter reads.
    let sampling = SamplingParams { repetition_penalty: 1.1, ..SamplingParams::default() };
    let asked = Request { sampling: sampling.into(), ..request(1, 5, 17) };
    let late = Knowing { wrong: 3, late: true };
    let (outcomes, steps) =
        serve(engine(&config(DrafterConfig::External {}, 4), Some(late), 64), std::slice::from_ref(&asked));
    assert_eq!(outcomes[&1].tokens, reference(&asked, 64, 64).0);
    assert!(sum(&steps, |s| s.batch.accepted_tokens) > 3 && sum(&steps, |s| s.batch.refused_drafts) > 1);
}

/// Asks a drafter in every second step alone, as lengths that adapt to the load may.
struct EverySecond(Box<dyn Drafter>, u32);

impl Drafter for EverySecond {
    fn prepare(&mut self, target: DraftTarget<'_>) -> Result<(), EngineError> {
        self.0.prepare(target)
    }
    fn begin(&mut self) {
        self.0.begin();
    }
    fn propose(&mut self, context: DraftContext<'_>, most: u32, drafts: &mut Vec<u32>) {
        self.1 += 1;
        if self.1.is_multiple_of(2) {
            self.0.propose(context, most, drafts);
        }
    }
    fn complete(&mut self, to: &mut dyn Executor, batch: &mut ScheduledBatch) -> Result<(), EngineError> {
        self.0.complete(to, batch)
    }
}

#[test]
fn a_draft_model_forgets_what_was_refused() {
    let asked = request(1, 5, 55);
    let served = |drafter: Box<dyn Drafter>| {
        let parts = EngineParts { policy: None, drafter: Some(Box::new(EverySecond(drafter, 0))) };
        let settings = config(DrafterConfig::External {}, 4);
        let engine = Engine::with_parts(Fake::new(64, 64, 32), &settings, parts).unwrap();
        let (outcomes, steps) = serve(engine, std::slice::from_ref(&asked));
        assert_eq!(outcomes[&1].tokens, reference(&asked, 64, 64).0);
        (sum(&steps, |s| s.batch.drafted_tokens), sum(&steps, |s| s.batch.accepted_tokens))
    };
    // The model is wrong where this drafter is, and nowhere else: it reads no K and V of a proposal that was refused.
    let model = Fake { wrong: 3, ..Fake::new(64, 64, 32) };
    let [expected, counts] =
        [Box::new(Knowing::new(3)) as Box<dyn Drafter>, Box::new(DraftModel::new(Box::new(model)))]
            .map(served);
    assert_eq!(counts, expected);
    assert!(counts.1 > 0 && counts.1 < counts.0);
}

#[test]
fn a_draft_model_catches_up_with_a_long_prompt_in_parts() {
    let served = |requests: &[Request], slots: usize| {
        let model = DraftModel::new(Box::new(Fake::new(slots, 64, 32)));
        let parts = EngineParts { policy: None, drafter: Some(Box::new(model)) };
        let settings = config(DrafterConfig::Model {}, 3);
        let engine = Engine::with_parts(Fake::new(slots, 64, 32), &settings, parts).unwrap();
        let (outcomes, steps) = serve(engine, requests);
        for asked in requests {
            assert_eq!(outcomes[&asked.id].tokens, reference(asked, 64, slots as u32).0);
        }
        // The same model, so all that it proposes is right.
        assert_eq!(sum(&steps, |s| s.batch.refused_drafts), 0);
        steps
    };
    // Two steps compute the prompt of 50 tokens. It and a token are more than a step's 32; the 20 left in the next are not.
    let steps = served(&[request(1, 50, 12)], 64);
    let drafted: Vec<u32> = steps.iter().map(|s| s.batch.drafted_tokens).collect();
    assert_eq!(drafted, [0, 0, 0, 3, 3, 1]);
    // Several of them, for which memory runs short.
    let requests: Vec<Request> = (0..5).map(|id| request(id, 40 + id as u32, 20)).collect();
    let steps = served(&requests, 160);
    assert!(sum(&steps, |s| s.batch.preempted) > 0 && sum(&steps, |s| s.batch.accepted_tokens) > 0);
}

#[test]
fn a_wrong_token_id_ends_the_engine() {
    struct Wild;
    impl Drafter for Wild {
        fn propose(&mut self, _: DraftContext<'_>, _: u32, drafts: &mut Vec<u32>) {
            drafts.push(VOCAB);
        }
    }
    let parts = EngineParts { policy: None, drafter: Some(Box::new(Wild)) };
    let settings = config(DrafterConfig::External {}, 2);
    let mut engine = Engine::with_parts(Fake::new(64, 64, 32), &settings, parts).unwrap();
    engine.submit(request(1, 5, 20), Instant::now());
    engine.step(Instant::now()).unwrap();
    let error = engine.step(Instant::now()).unwrap_err().to_string();
    assert!(error.contains("proposes token 1000"), "{error}");
}

#[test]
fn synthetic_proposals_are_accepted_as_often_as_stated() {
    let requests: Vec<Request> = (0..200).map(|id| request(id, 3, 50)).collect();
    let mut settings = config(DrafterConfig::Synthetic { acceptance: 0.6, seed: 7 }, 3);
    settings.scheduler.token_budget = 1024;
    let (outcomes, steps) = serve(engine(&settings, None, 20_000), &requests);
    assert!(outcomes.values().all(|o| o.tokens.len() == 50 && matches!(o.end, Some(Event::Finished { .. }))));
    let accepted = f64::from(sum(&steps, |s| s.batch.accepted_tokens));
    let tested = accepted + f64::from(sum(&steps, |s| s.batch.refused_drafts));
    assert!((accepted / tested - 0.6).abs() < 0.02, "{accepted} of {tested}");
    // Equation 1: (1 - a^4) / (1 - a) = 2.176 tokens a step.
    let decodes = f64::from(sum(&steps, |s| s.batch.decode_tokens));
    assert!((200.0 * 49.0 / decodes - 2.176).abs() < 0.06, "{decodes}");
}

#[test]
fn settings_that_cannot_be_are_refused() {
    let refused = |config: &EngineConfig, drafter: Option<Knowing>| {
        let drafter = drafter.map(|drafter| Box::new(drafter) as Box<dyn Drafter>);
        let parts = EngineParts { policy: None, drafter };
        Engine::with_parts(Fake::new(64, 64, 32), config, parts).unwrap_err().to_string()
    };
    let ngram = DrafterConfig::NGram { longest: 2, shortest: 3 };
    assert!(refused(&config(ngram, 2), None).contains("look-ups of 3 to 2"));
    let ngram = DrafterConfig::NGram { longest: 65, shortest: 1 };
    assert!(refused(&config(ngram, 2), None).contains("look-ups of 1 to 65 tokens: choose 1 to 64"));
    assert!(refused(&config(DrafterConfig::Suffix { depth: 16 }, 0), None).contains("0 tokens"));
    assert!(refused(&config(DrafterConfig::EarlyExit { layers: 1 }, 2), None).contains("cannot leave"));
    assert!(refused(&config(DrafterConfig::Model {}, 2), None).contains("a drafter is given"));
    let suffix = config(DrafterConfig::Suffix { depth: 16 }, 2);
    assert!(refused(&suffix, Some(Knowing::new(0))).contains("neither"));
    let acceptance = DrafterConfig::Synthetic { acceptance: 1.5, seed: 0 };
    assert!(refused(&config(acceptance, 2), None).contains("0 to 1"));
    let mut overlap = suffix.clone();
    overlap.scheduler.overlap = Some(true);
    assert!(refused(&overlap, None).contains("overlap"));
    let mut fixed = suffix;
    fixed.scheduler.policy = PolicyConfig::Static { batch_size: 2, timeout_ms: 0 };
    assert!(refused(&fixed, None).contains("static batching"));
    let plain = EngineConfig { speculation: None, ..overlap };
    assert!(refused(&plain, Some(Knowing::new(0))).contains("no speculation"));
}
