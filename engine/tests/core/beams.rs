//! Beam search, held against one that computes every beam anew from its tokens.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use quire_engine::{
    BeamSearch, EarlyStopping, Engine, EngineConfig, Event, FinishReason, KvLayout, PolicyConfig,
    PreemptionConfig, Request, Reservation, SamplingParams, SchedulerConfig,
};

use crate::fake::{Fake, Outcome, candidates, drain, engine, reference, request, serve, sum, turn};

const MODEL_LEN: u32 = 64;

/// What a search must find: tokens and reasons, the best first.
pub(crate) fn search(request: &Request, model_len: u32, largest: u32) -> Vec<(Vec<u32>, FinishReason)> {
    let beam = request.beam.expect("a beam search");
    let (width, prompt) = (beam.width as usize, request.prompt.len());
    let score = |logprob: f64, len: usize| logprob / (len as f64).powf(f64::from(beam.length_penalty));
    // As many as surely leave `width` that go on.
    let looked_at = beam.width * (1 + request.stop_tokens.len() as u32).clamp(2, 8);
    let longest = request.max_tokens.min(model_len - prompt as u32) as usize;
    let mut beams = vec![(0.0, Vec::new())];
    let mut done: Vec<(f64, Vec<u32>, FinishReason)> = Vec::new();
    loop {
        let mut next: Vec<(f64, Vec<u32>)> = Vec::new();
        for (logprob, output) in &beams {
            let history = [&request.prompt[..], output].concat();
            for candidate in candidates(&history, looked_at).iter() {
                next.push((
                    logprob + f64::from(candidate.logprob),
                    [&output[..], &[candidate.token]].concat(),
                ));
            }
        }
        next.sort_by(|a, b| b.0.total_cmp(&a.0));
        next.truncate(looked_at as usize);
        beams.clear();
        for (rank, (logprob, output)) in next.into_iter().enumerate() {
            let stops = request.stop_tokens.contains(output.last().unwrap())
                || request.true_output_len.is_some_and(|len| output.len() >= len as usize);
            let reason = if stops {
                FinishReason::Stop
            } else if output.len() >= longest {
                FinishReason::Length
            } else if prompt + output.len() > largest as usize {
                FinishReason::KvExhausted
            } else {
                beams.push((logprob, output));
                if beams.len() == width {
                    break;
                }
                continue;
            };
            if rank < width {
                done.push((score(logprob, output.len()), output, reason));
                done.sort_by(|a, b| b.0.total_cmp(&a.0));
                done.truncate(width);
            }
        }
        let Some((best, output)) = beams.first() else { break };
        let attainable = match beam.early_stopping {
            EarlyStopping::Always => f64::NEG_INFINITY,
            EarlyStopping::Impossible if beam.length_penalty > 0.0 => score(*best, longest),
            _ => score(*best, output.len()),
        };
        if done.len() == width && done[width - 1].0 >= attainable {
            break;
        }
    }
    done.into_iter().map(|(_, output, reason)| (output, reason)).collect()
}

fn found(outcome: &Outcome) -> Vec<(Vec<u32>, FinishReason)> {
    outcome.hypotheses.iter().map(|found| (found.tokens.clone(), found.reason)).collect()
}

fn config(kv: KvLayout, max_running: u32) -> EngineConfig {
    let policy = PolicyConfig::Continuous { watermark: 0.0 };
    EngineConfig {
        scheduler: SchedulerConfig { policy, token_budget: 32, max_running, ..SchedulerConfig::default() },
        kv,
        ..EngineConfig::default()
    }
}

fn beam(id: u64, prompt: u32, output: u32, width: u32) -> Request {
    Request { beam: Some(BeamSearch::new(width)), ..request(id, prompt, output) }
}

const PAGED: KvLayout = KvLayout::Paged { block_size: 4 };

#[test]
fn it_finds_what_a_search_without_an_engine_finds() {
    let early = [EarlyStopping::Always, EarlyStopping::Unlikely, EarlyStopping::Impossible];
    let mut stopped = 0;
    for (width, early_stopping, length_penalty) in (1..=16)
        .flat_map(|width| early.map(|early| (width, early, [-0.5, 0.0, 1.0, 2.0][width as usize % 4])))
    {
        let search_for = BeamSearch { width, length_penalty, early_stopping };
        // One in eight tokens ends an output.
        let asked = Request {
            beam: Some(search_for),
            stop_tokens: (0..1000).filter(|token| token % 8 == 3).collect(),
            ..request(u64::from(width), 9, 20)
        };
        let (outcomes, _) =
            serve(engine(&config(PAGED, 32), 1024, MODEL_LEN as usize), std::slice::from_ref(&asked));
        let outcome = &outcomes[&asked.id];
        assert_eq!(found(outcome), search(&asked, MODEL_LEN, 1024), "{search_for:?}");
        stopped += outcome.hypotheses.iter().filter(|found| found.reason == FinishReason::Stop).count();
        assert!(outcome.hypotheses.is_sorted_by(|a, b| a.score >= b.score));
        assert!(outcome.tokens.is_empty());
    }
    assert!(stopped > 200, "stop tokens end {stopped} of 408");
}

#[test]
fn one_beam_is_the_greedy_output() {
    let asked = beam(3, 7, 12, 1);
    let (outcomes, _) =
        serve(engine(&config(PAGED, 4), 64, MODEL_LEN as usize), std::slice::from_ref(&asked));
    assert_eq!(outcomes[&3].hypotheses[0].tokens, reference(&asked, MODEL_LEN, 64).0);
}

#[test]
fn beams_share_what_they_have_in_common_and_copy_the_block_they_write_to() {
    // 17 tokens: 4 full blocks and one token in the fifth.
    let asked = beam(1, 17, 8, 4);
    let (outcomes, steps) =
        serve(engine(&config(PAGED, 8), 256, MODEL_LEN as usize), std::slice::from_ref(&asked));
    assert_eq!(found(&outcomes[&1]), search(&asked, MODEL_LEN, 256));
    // The prompt is computed once, and a token for each beam and step.
    assert_eq!(sum(&steps, |s| s.batch.prefill_tokens), 17);
    assert!(sum(&steps, |s| s.batch.decode_tokens) <= 4 * 7);
    let second = &steps[1].batch;
    let used = second.kv.total() - second.kv.free;
    assert_eq!((second.running, used), (4, 4 * (4 + 4)), "four full blocks once, and one of each beam");
    assert_eq!(second.kv.shared, 3 * 16);
}

#[test]
fn without_sharing_a_beam_that_forks_copies_all_its_blocks() {
    let asked = beam(1, 17, 8, 4);
    let config = EngineConfig { share_blocks: false, ..config(PAGED, 8) };
    let (outcomes, steps) = serve(engine(&config, 256, MODEL_LEN as usize), std::slice::from_ref(&asked));
    assert_eq!(found(&outcomes[&1]), search(&asked, MODEL_LEN, 256));
    // What is copied is not computed.
    assert_eq!(sum(&steps, |s| s.batch.prefill_tokens), 17);
    let second = &steps[1].batch;
    let used = second.kv.total() - second.kv.free;
    assert_eq!((second.running, used), (4, 4 * 4 * 5), "five blocks of each beam");
    assert!(steps.iter().all(|step| step.batch.kv.shared == 0));
}

#[test]
fn a_search_fits_where_one_sequence_fits() {
    for (kv, slots) in [
        (KvLayout::Paged { block_size: 1 }, 24),
        (PAGED, 24),
        (KvLayout::Contiguous { reservation: Reservation::Oracle }, 32),
    ] {
        for max_running in [1, 3] {
            for swap in [false, true] {
                let preemption = match swap {
                    true => PreemptionConfig::Swap { bytes: 64 },
                    false => PreemptionConfig::Recompute {},
                };
                let config = EngineConfig { preemption, ..config(kv, max_running) };
                let asked = Request { true_output_len: Some(9), ..beam(1, 14, 9, 3) };
                let (outcomes, _) =
                    serve(engine(&config, slots, MODEL_LEN as usize), std::slice::from_ref(&asked));
                assert_eq!(found(&outcomes[&1]), search(&asked, MODEL_LEN, slots as u32));
                let Some(Event::Finished { preemptions, .. }) = outcomes[&1].end else { panic!() };
                assert!(preemptions > 0, "three beams do not fit in {slots} slots");
            }
        }
    }
}

#[test]
fn a_search_among_others_ends_or_is_cancelled() {
    let mut engine = engine(&config(PAGED, 5), 128, MODEL_LEN as usize);
    let (mut now, mut outcomes) = (Instant::now(), BTreeMap::new());
    let asked: Vec<Request> =
        vec![beam(1, 9, 14, 4), request(2, 11, 20), beam(3, 6, 10, 2), beam(4, 20, 6, 3)];
    asked.iter().for_each(|request| engine.submit(request.clone(), now));
    for _ in 0..5 {
        turn(&mut engine, now, &mut outcomes);
    }
    engine.cancel(1);
    drain(&mut engine, &mut now, &mut outcomes);
    assert!(matches!(outcomes[&1].end, Some(Event::Cancelled { .. })) && outcomes[&1].hypotheses.is_empty());
    assert_eq!(outcomes[&2].tokens, reference(&asked[1], MODEL_LEN, 128).0);
    for asked in &asked[2..] {
        assert_eq!(found(&outcomes[&asked.id]), search(asked, MODEL_LEN, 128));
    }
}

#[test]
fn what_a_search_cannot_be_is_said() {
    let fixed = PolicyConfig::Static { batch_size: 4, timeout_ms: 1 };
    let static_batches = EngineConfig {
        scheduler: SchedulerConfig { policy: fixed, ..SchedulerConfig::default() },
        ..config(PAGED, 8)
    };
    let drawn = Arc::new(SamplingParams { temperature: 0.5, ..SamplingParams::default() });
    let cases = [
        (config(PAGED, 8), beam(1, 5, 5, 17), "the beam width is 17: choose 1 to 16"),
        (
            config(PAGED, 8),
            Request { sampling: drawn, ..beam(1, 5, 5, 2) },
            "leave sampling's parameters out",
        ),
        (config(PAGED, 8), Request { fork_of: Some(9), ..beam(1, 5, 5, 2) }, "a fork of another request"),
        (static_batches, beam(1, 5, 5, 2), "needs a policy that admits while others run"),
    ];
    for (config, asked, expected) in cases {
        let (outcomes, _) = serve(engine(&config, 128, MODEL_LEN as usize), &[asked]);
        let Some(Event::Rejected { reason, .. }) = &outcomes[&1].end else { panic!("{:?}", outcomes[&1]) };
        assert!(reason.contains(expected), "{reason}");
    }
    let first: Engine<Fake> = engine(&config(PAGED, 8), 128, MODEL_LEN as usize);
    let fork = Request { id: 2, fork_of: Some(1), beam: None, ..beam(1, 5, 5, 2) };
    let (outcomes, _) = serve(first, &[beam(1, 5, 5, 2), fork]);
    assert!(
        matches!(&outcomes[&2].end, Some(Event::Rejected { reason, .. }) if reason.contains("is a beam search"))
    );
}

#[test]
fn what_a_search_found_in_the_cache_is_of_its_prompt() {
    let config = EngineConfig { prefix_cache: true, ..config(PAGED, 8) };
    let mut engine = engine(&config, 256, MODEL_LEN as usize);
    let (mut now, mut outcomes) = (Instant::now(), BTreeMap::new());
    for id in [1, 2] {
        engine.submit(Request { id, ..beam(1, 17, 12, 4) }, now);
        drain(&mut engine, &mut now, &mut outcomes);
    }
    let cached = |id| match outcomes[&id].end {
        Some(Event::Finished { cached_tokens, .. }) => cached_tokens,
        ref other => panic!("{other:?}"),
    };
    // Four full blocks, although forks began with more.
    assert_eq!([cached(1), cached(2)], [0, 16]);
}
