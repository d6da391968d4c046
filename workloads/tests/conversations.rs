//! Conversations of several turns and priority classes, on a clock that moves only when somebody waits.

use std::collections::BTreeMap;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use proptest::prelude::*;
use quire_workloads::mock::{Script, ScriptedSystem, VirtualClock};
use quire_workloads::*;

const LIMITS: ModelLimits = ModelLimits { vocab_size: 100, reserved_ids: 0, max_model_len: 64 };

fn ms(milliseconds: u64) -> Duration {
    Duration::from_millis(milliseconds)
}

/// Conversations of three turns of 4 prompt and 3 answer tokens, each 100 ms after the answer before it; `rate` requests a
/// second.
fn spec(rate: f64, requests: usize) -> WorkloadSpec {
    let think = Some(ThinkTime::Fixed { seconds: 0.1 });
    WorkloadSpec {
        requests,
        lengths: LengthSource::Pairs { pairs: vec![[4, 3]] },
        arrivals: ArrivalProcess::Uniform { rate },
        length_scale: 1.0,
        over_limit: OverLimit::Keep,
        shared_prefix: 0,
        conversations: Some(ConversationSpec { turns: TurnCount::Fixed { turns: 3 }, think, later: None }),
        classes: Vec::new(),
        decoding: Decoding::Single {},
    }
}

fn make(spec: &WorkloadSpec) -> Workload {
    Workload::generate(spec, 1, &LIMITS).unwrap()
}

type Sent = BTreeMap<u64, GenerationRequest>;

/// Runs `workload` under scripts; gives what was sent too.
fn run(
    workload: &Workload,
    options: LoadOptions,
    mut script: impl FnMut(&GenerationRequest) -> Script + Send + 'static,
) -> (LoadResult, Sent) {
    let clock = VirtualClock::new();
    let sent = Arc::new(Mutex::new(Sent::new()));
    let log = Arc::clone(&sent);
    let mut system = ScriptedSystem::new(clock.clone(), move |request| {
        log.lock().unwrap().insert(request.id, request.clone());
        script(request)
    });
    let generator = LoadGenerator::new(workload, options).unwrap();
    let result = generator.run(&mut system, &clock, &AtomicBool::new(false), &mut |_| {});
    let sent = sent.lock().unwrap().clone();
    (result, sent)
}

/// Answers of 50 ms.
fn healthy(request: &GenerationRequest) -> Script {
    Script::healthy(request, ms(30), ms(10))
}

fn report(begun: u64, completed: u64, broken: u64) -> Option<ConversationReport> {
    Some(ConversationReport { begun, completed, broken })
}

#[test]
fn a_turn_is_the_conversation_so_far_and_comes_when_its_user_has_thought() {
    // Six requests at 3 a second: two conversations of three turns, a second apart.
    let workload = make(&spec(3.0, 6));
    let turns: Vec<(u64, u32)> =
        workload.requests.iter().map(|r| r.turn.map(|t| (t.conversation, t.turn)).unwrap()).collect();
    assert_eq!(turns, [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]);
    let (result, sent) = run(&workload, LoadOptions::default(), healthy);
    assert!(result.is_valid(), "{:?} {:?}", result.void, result.protocol_errors);
    assert_eq!((result.conversations, result.not_reached), (report(2, 2, 0), 0));
    let answer = |id: u64| (0..3).map(move |i| (id as u32) * 31 + i).collect::<Vec<u32>>();
    for first in [0, 3] {
        let own = |turn: u64| &workload.requests[(first + turn) as usize].prompt[..];
        assert_eq!(sent[&first].prompt, own(0));
        assert_eq!(sent[&(first + 1)].prompt, [own(0), &answer(first), own(1)].concat());
        let third = [own(0), &answer(first), own(1), &answer(first + 1), own(2)].concat();
        assert_eq!((third.len(), &sent[&(first + 2)].prompt), (18, &third));
        assert_eq!(sent[&(first + 2)].max_tokens, 64 - 18);
    }
    let mut records = result.records.clone();
    records.sort_by_key(|record| record.id);
    let intended: Vec<f64> = records.iter().map(|r| (r.intended_s * 1e3).round()).collect();
    assert_eq!(intended, [0.0, 150.0, 300.0, 1000.0, 1150.0, 1300.0]);
    assert_eq!(records.iter().map(|r| r.prompt_tokens).collect::<Vec<_>>(), [4, 11, 18, 4, 11, 18]);
    assert_eq!(records[5].turn, Some(Turn { conversation: 1, turn: 2 }));
    assert!(records.iter().all(|r| r.lag_s() == Some(0.0) && (r.ttft_s().unwrap() - 0.03).abs() < 1e-9));
    let lines = records.iter().map(|r| serde_json::to_string(r).unwrap()).collect::<Vec<_>>().join("\n");
    assert_eq!(read_records(lines.as_bytes(), "r").unwrap(), records);
}

#[test]
fn a_turn_without_its_whole_answer_is_the_last() {
    let workload = make(&spec(3.0, 15));
    let (result, sent) = run(&workload, LoadOptions::default(), |request| match request.id {
        0 => Script::default().rejected(ms(1), "no room"),
        4 => Script::default().tokens(ms(5), &[1]).failed(ms(5), "broke"),
        6 => Script::default().tokens(ms(5), &[1]).finished(ms(5), FinishReason::KvExhausted),
        9 => Script::default().tokens(ms(5), &[1]).event(ms(2), EventKind::Cancelled),
        _ => healthy(request),
    });
    assert!(result.is_valid(), "{:?}", result.protocol_errors);
    assert_eq!(sent.keys().copied().collect::<Vec<_>>(), [0, 3, 4, 6, 9, 12, 13, 14]);
    assert_eq!((result.conversations, result.not_reached), (report(5, 1, 4), 7));
    assert_eq!(result.records.len(), 8);
}

#[test]
fn too_many_tokens_are_a_broken_protocol_and_no_longer_prompt() {
    let (result, sent) = run(&make(&spec(3.0, 3)), LoadOptions::default(), |_| {
        Script::default().tokens(ms(1), &[7; 9]).stop(ms(1))
    });
    assert!(!result.is_valid());
    assert_eq!(sent[&2].prompt.len(), 18, "as the workload has it");
}

#[test]
fn the_models_limit_ends_a_conversation() {
    // 30 tokens a turn: after two turns the third would end at 90.
    let spec = |over_limit| WorkloadSpec {
        lengths: LengthSource::Pairs { pairs: vec![[20, 10]] },
        over_limit,
        ..spec(3.0, 4)
    };
    let dropped = make(&spec(OverLimit::Drop));
    assert_eq!(dropped.requests.len(), 4);
    let header = &dropped.header;
    let drawn = header.conversations.unwrap();
    assert_eq!((drawn.count, drawn.ended_early, header.dropped, header.shortened), (2, 2, 0, 0));
    let (result, _) = run(&dropped, LoadOptions::default(), healthy);
    assert_eq!((result.conversations, result.not_reached), (report(2, 2, 0), 0));
    // Kept, the third is sent: a system rejects it.
    let kept = make(&spec(OverLimit::Keep));
    let header = &kept.header;
    assert_eq!(
        (kept.requests.len(), header.inadmissible, header.conversations.unwrap().ended_early),
        (6, 2, 0)
    );
    assert_eq!(kept.requests[2].max_tokens, 1);
    // Where even a first turn does not fit, another conversation takes its place.
    let long = WorkloadSpec {
        lengths: LengthSource::Pairs { pairs: vec![[60, 10], [4, 3]] },
        ..spec(OverLimit::Drop)
    };
    let long = make(&WorkloadSpec { requests: 60, ..long });
    assert!(long.header.dropped > 5, "{}", long.header.dropped);
    assert!(long.requests.iter().all(|request| request.prompt.len() == 4));
}

#[test]
fn no_turn_comes_after_the_last_time() {
    // A second of requests: conversations begin at 0 and at 0.5 s, and the second cannot come to its third turn.
    let slow = |request: &GenerationRequest| Script::healthy(request, ms(150), ms(10));
    let spec = spec(6.0, 6);
    let workload = make(&spec);
    assert_eq!(workload.header.conversations.unwrap().last_turn_s, Some(1.0));
    let (result, sent) = run(&workload, LoadOptions::default(), slow);
    assert_eq!(sent.keys().copied().collect::<Vec<_>>(), [0, 1, 2, 3, 4]);
    assert_eq!((result.conversations, result.not_reached), (report(2, 1, 0), 1));
    assert!(result.is_valid() && result.records.iter().all(|r| r.intended_s <= 1.0));
    // Waiting for the last requests begins there, however late the last one came: this one comes at 0.5 s.
    let stalled = |_: &GenerationRequest| Script::default();
    let options = LoadOptions { drain_limit_s: 2.0, ..Default::default() };
    let (result, _) = run(&workload, options, stalled);
    assert_eq!((result.ended_s, result.conversations), (3.0, report(2, 0, 0)));
    // All at once there is no rate, so that there is no such time.
    let all = make(&WorkloadSpec { arrivals: ArrivalProcess::AllAtOnce {}, ..spec });
    assert_eq!(all.header.conversations.unwrap().last_turn_s, None);
    assert_eq!(run(&all, LoadOptions::default(), slow).0.conversations, report(2, 2, 0));
}

#[test]
fn the_rate_is_of_requests() {
    let conversations = ConversationSpec {
        turns: TurnCount::Geometric { mean: 4.0 },
        think: Some(ThinkTime::Exponential { mean_s: 0.5 }),
        later: None,
    };
    let spec = WorkloadSpec {
        lengths: LengthSource::Pairs { pairs: vec![[1, 1]] },
        arrivals: ArrivalProcess::Poisson { rate: 10.0 },
        conversations: Some(conversations),
        ..spec(1.0, 10_000)
    };
    let limits = ModelLimits { max_model_len: 4096, ..LIMITS };
    let workload = Workload::generate(&spec, 1, &limits).unwrap();
    let (result, _) = run(&workload, LoadOptions::default(), healthy);
    let in_time = |from: f64, to: f64| {
        let count = result.records.iter().filter(|r| (from..to).contains(&r.intended_s)).count();
        count as f64 / (to - from)
    };
    assert!((in_time(100.0, 900.0) - 10.0).abs() < 0.7, "{}", in_time(100.0, 900.0));
    assert!(in_time(0.0, 0.5) < 8.0, "at first there are only first turns");
    // Another rate changes when conversations begin, and nothing else.
    let fast = Workload::generate(&spec.at_rate(20.0).unwrap(), 1, &limits).unwrap();
    for (a, b) in workload.requests.iter().zip(&fast.requests) {
        let scale = if a.turn.unwrap().turn == 0 { 2.0 } else { 1.0 };
        assert!((a.arrival_s - scale * b.arrival_s).abs() < 1e-9 && a.prompt == b.prompt);
    }
    // Fewer requests are the same conversations, as far as they go.
    let fewer = Workload::generate(&WorkloadSpec { requests: 100, ..spec }, 1, &limits).unwrap();
    assert!(
        fewer.requests.iter().zip(&workload.requests).all(|(a, b)| a.prompt == b.prompt && a.turn == b.turn)
    );
}

#[test]
fn turns_are_distributed_as_stated() {
    let turns = |turns: TurnCount| -> Vec<u32> {
        let conversations = Some(ConversationSpec { turns, think: None, later: None });
        let lengths = LengthSource::Pairs { pairs: vec![[1, 1]] };
        let spec = WorkloadSpec { lengths, conversations, ..spec(1.0, 20_000) };
        let limits = ModelLimits { max_model_len: 1 << 16, ..LIMITS };
        let workload = Workload::generate(&spec, 3, &limits).unwrap();
        let mut counts = BTreeMap::new();
        for turn in workload.requests.iter().filter_map(|request| request.turn) {
            *counts.entry(turn.conversation).or_insert(0) += 1;
        }
        counts.into_values().collect()
    };
    let share = |counts: &[u32], of: u32| {
        counts.iter().filter(|count| **count == of).count() as f64 / counts.len() as f64
    };
    let mean = |counts: &[u32]| counts.iter().sum::<u32>() as f64 / counts.len() as f64;
    let geometric = turns(TurnCount::Geometric { mean: 3.7 });
    assert!((mean(&geometric) / 3.7 - 1.0).abs() < 0.03, "{}", mean(&geometric));
    assert!((share(&geometric, 1) - 1.0 / 3.7).abs() < 0.02 && share(&geometric, 2) < share(&geometric, 1));
    let weighted = turns(TurnCount::Weights { weights: vec![3.0, 0.0, 1.0] });
    assert_eq!(share(&weighted, 2), 0.0);
    assert!((share(&weighted, 1) - 0.75).abs() < 0.02 && weighted.iter().all(|count| *count <= 3));
    assert!(turns(TurnCount::Geometric { mean: 1.0 }).iter().all(|count| *count == 1));
}

#[test]
fn later_turns_may_have_lengths_of_their_own_and_begin_with_the_shared_tokens_once() {
    let fixed = |tokens| LengthDistribution::Fixed { tokens };
    let mut spec = WorkloadSpec { shared_prefix: 10, length_scale: 0.5, ..spec(3.0, 3) };
    spec.conversations.as_mut().unwrap().later = Some(LaterTurns { input: fixed(2), output: fixed(12) });
    let workload = make(&spec);
    let lengths = |r: &WorkloadRequest| (r.prompt.len(), r.true_output_len.unwrap());
    // 1.5 tokens are rounded to 2.
    assert_eq!(workload.requests.iter().map(lengths).collect::<Vec<_>>(), [(7, 2), (1, 6), (1, 6)]);
    let (_, sent) = run(&workload, LoadOptions::default(), healthy);
    assert_eq!(sent[&2].prompt.len(), 7 + 2 + 1 + 6 + 1);
}

#[test]
fn conversations_and_classes_are_checked() {
    let wrong = |change: fn(&mut WorkloadSpec)| {
        let mut spec = spec(3.0, 6);
        change(&mut spec);
        spec.validate().unwrap_err().to_string()
    };
    fn turns(spec: &mut WorkloadSpec, turns: TurnCount) {
        spec.conversations.as_mut().unwrap().turns = turns;
    }
    assert!(wrong(|s| turns(s, TurnCount::Fixed { turns: 0 })).starts_with("conversations.turns:"));
    assert!(wrong(|s| turns(s, TurnCount::Geometric { mean: 0.5 })).contains("is 0.5"));
    assert!(wrong(|s| turns(s, TurnCount::Weights { weights: vec![1.0, -1.0] })).contains("is -1"));
    assert!(wrong(|s| turns(s, TurnCount::Weights { weights: vec![0.0] })).contains("sum of the weights"));
    let think = |s: &mut WorkloadSpec| {
        s.conversations.as_mut().unwrap().think = Some(ThinkTime::Fixed { seconds: f64::NAN });
    };
    assert!(wrong(think).starts_with("conversations.think:"));
    assert!(wrong(|s| s.lengths = LengthSource::Trace(TraceSource::new("t"))).contains("as they came"));
    assert!(
        wrong(|s| s.arrivals = ArrivalProcess::ClosedLoop { users: 1, think: None }).contains("closed loop")
    );
    assert!(wrong(|s| s.classes = vec![1, 0]).starts_with("classes:"));
    assert!(wrong(|s| s.classes = vec![1; 17]).contains("17 classes"));
    // What all conversations together hold is bounded before any of it is made.
    let lengths = LengthSource::Pairs { pairs: vec![[20, 10]] };
    let limits = ModelLimits { max_model_len: 1 << 12, ..LIMITS };
    let large = WorkloadSpec { lengths, ..spec(3.0, 10_000_000) };
    assert!(Workload::generate(&large, 1, &limits).unwrap_err().to_string().contains("prompt tokens in all"));
}

#[test]
fn a_workload_of_conversations_survives_a_file_and_is_checked_when_read() {
    let workload =
        Workload::generate(&WorkloadSpec { classes: vec![1, 2], ..spec(3.0, 9) }, 1, &LIMITS).unwrap();
    let mut file = Vec::new();
    workload.write_jsonl(&mut file).unwrap();
    assert_eq!(Workload::read_jsonl(&file[..], "w").unwrap(), workload);
    let text = String::from_utf8(file).unwrap();
    let torn = text.replacen("\"turn\":1", "\"turn\":2", 1);
    let error = Workload::read_jsonl(torn.as_bytes(), "w").unwrap_err().to_string();
    assert!(error.contains("does not follow the turn before it"), "{error}");
}

#[test]
fn classes_come_by_weight_and_turns_keep_theirs() {
    let plain = WorkloadSpec { conversations: None, ..spec(3.0, 20_000) };
    let classed = WorkloadSpec { classes: vec![1, 3], ..plain.clone() };
    let workload = make(&classed);
    let best = workload.requests.iter().filter(|request| request.class == Some(0)).count();
    assert!((best as f64 / 20_000.0 - 0.25).abs() < 0.01, "{best}");
    // Everything else is as without classes.
    let same =
        |(a, b): (&WorkloadRequest, &WorkloadRequest)| a == &WorkloadRequest { class: None, ..b.clone() };
    assert!(make(&plain).requests.iter().zip(&workload.requests).all(same));
    let talks = make(&WorkloadSpec { classes: vec![1, 1, 1], ..spec(3.0, 60) });
    assert!(talks.requests.chunks(3).all(|turns| turns.iter().all(|turn| turn.class == turns[0].class)));
    let (result, sent) = run(&talks, LoadOptions::default(), healthy);
    for record in &result.records {
        assert_eq!(record.class, talks.requests[record.id as usize].class);
        assert_eq!(Some(sent[&record.id].class), record.class);
    }
    let used: std::collections::BTreeSet<_> = sent.values().map(|request| request.class).collect();
    assert_eq!(used.into_iter().collect::<Vec<_>>(), [0, 1, 2]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    /// Whatever the system does, a turn has the prompt that the workload says, and comes after the one before it.
    #[test]
    fn prompts_grow_as_planned(
        (seed, requests, rate, mean) in (any::<u64>(), 1..60_usize, 0.5..50.0, 1.0..6.0),
        (keep, broken, limit_s) in (any::<bool>(), 1..9_u64, 0.5..20.0),
    ) {
        let length = |max| LengthDistribution::Uniform { min: 1, max };
        let spec = WorkloadSpec {
            requests,
            lengths: LengthSource::Independent { input: length(9), output: length(9) },
            arrivals: ArrivalProcess::Gamma { rate, cv: 2.0 },
            over_limit: if keep { OverLimit::Keep } else { OverLimit::Drop },
            conversations: Some(ConversationSpec {
                turns: TurnCount::Geometric { mean },
                think: Some(ThinkTime::Exponential { mean_s: 0.2 }),
                later: Some(LaterTurns { input: length(3), output: length(15) }),
            }),
            ..spec(rate, requests)
        };
        let workload = Workload::generate(&spec, seed, &LIMITS).unwrap();
        prop_assert!(workload.requests.len() >= requests);
        let options = LoadOptions { time_limit_s: Some(limit_s), ..Default::default() };
        let (result, sent) = run(&workload, options, move |request| match request.id % broken {
            7 => Script::default().rejected(ms(1), "no"),
            _ if request.prompt.len() >= 64 => Script::default().rejected(ms(1), "too long"),
            _ => healthy(request),
        });
        prop_assert!(result.is_valid(), "{:?} {:?}", result.void, result.protocol_errors);
        prop_assert_eq!(result.records.len() + result.not_reached as usize, workload.requests.len());
        let records: BTreeMap<u64, &RequestRecord> = result.records.iter().map(|r| (r.id, r)).collect();
        for (id, record) in &records {
            let own = &workload.requests[*id as usize].prompt;
            if let Some(request) = sent.get(id) {
                prop_assert_eq!(request.prompt.len() as u32, record.prompt_tokens);
                prop_assert!(keep || record.prompt_tokens + record.true_output_len.unwrap() <= 64);
            }
            if record.turn.unwrap().turn == 0 {
                prop_assert_eq!(record.prompt_tokens as usize, own.len());
                continue;
            }
            let before = records[&(id - 1)];
            prop_assert_eq!(record.prompt_tokens, before.prompt_tokens + before.output_tokens + own.len() as u32);
            prop_assert!(record.intended_s >= before.finish_s.unwrap());
        }
        let report = result.conversations.unwrap();
        prop_assert!(report.completed + report.broken <= report.begun);
    }
}
