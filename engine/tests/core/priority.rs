//! Priority classes: who runs, who is preempted, and for how long.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use quire_engine::{
    BeamSearch, Engine, EngineConfig, Event, KvLayout, PolicyConfig, Progress, Request, SchedulerConfig,
};

use crate::beams::search;
use crate::fake::{Fake, Outcome, drain, engine, reference, request, turn};

const SLOTS: usize = 64;

fn config(aging_ms: u64, max_running: u32) -> EngineConfig {
    with_chunks(true, aging_ms, max_running)
}

fn with_chunks(chunked: bool, aging_ms: u64, max_running: u32) -> EngineConfig {
    let policy = PolicyConfig::Priority { watermark: 0.0, aging_ms, chunked };
    EngineConfig {
        scheduler: SchedulerConfig { policy, token_budget: 32, max_running, ..SchedulerConfig::default() },
        kv: KvLayout::Paged { block_size: 4 },
        ..EngineConfig::default()
    }
}

fn of_class(priority: u8, id: u64, prompt: u32, output: u32) -> Request {
    Request { priority, ..request(id, prompt, output) }
}

fn preemptions(outcome: &Outcome) -> u32 {
    match outcome.end {
        Some(Event::Finished { preemptions, .. }) => preemptions,
        ref other => panic!("{other:?}"),
    }
}

/// Turns of the loop, a millisecond each.
fn turns(engine: &mut Engine<Fake>, now: &mut Instant, outcomes: &mut BTreeMap<u64, Outcome>, turns: u32) {
    for _ in 0..turns {
        turn(engine, *now, outcomes);
        *now += Duration::from_millis(1);
    }
}

#[test]
fn a_better_class_does_not_wait_for_a_worse_ones_prompt() {
    for chunked in [true, false] {
        let mut engine = engine(&with_chunks(chunked, 0, 3), 400, 300);
        let (mut now, mut outcomes) = (Instant::now(), BTreeMap::new());
        // Its prompt takes every row for eight steps. Memory is not short.
        engine.submit(of_class(3, 1, 256, 4), now);
        turns(&mut engine, &mut now, &mut outcomes, 1);
        engine.submit(of_class(0, 2, 5, 4), now);
        turns(&mut engine, &mut now, &mut outcomes, 1);
        assert_eq!(outcomes[&2].tokens.len(), 1);
        drain(&mut engine, &mut now, &mut outcomes);
        assert_eq!([1, 2].map(|id| preemptions(&outcomes[&id])), [0, 0]);
    }
}

#[test]
fn a_better_class_takes_the_place_of_the_last_of_the_worst() {
    for chunked in [true, false] {
        let mut engine = engine(&with_chunks(chunked, 0, 3), SLOTS, 64);
        let (mut now, mut outcomes) = (Instant::now(), BTreeMap::new());
        let first: Vec<Request> =
            [(1, 2), (2, 1), (3, 2)].map(|(id, class)| of_class(class, id, 5, 12)).into();
        first.iter().for_each(|request| engine.submit(request.clone(), now));
        turns(&mut engine, &mut now, &mut outcomes, 4);
        // Of its own class, 4 waits; 5 takes the place of 3, and 1 and 2 go on.
        engine.submit(of_class(2, 4, 5, 12), now);
        engine.submit(of_class(0, 5, 5, 6), now);
        turns(&mut engine, &mut now, &mut outcomes, 6);
        assert_eq!(outcomes[&5].tokens.len(), 6);
        assert!(!outcomes.contains_key(&4));
        drain(&mut engine, &mut now, &mut outcomes);
        assert_eq!([1, 2, 3, 4, 5].map(|id| preemptions(&outcomes[&id])), [0, 0, 1, 0, 0]);
        for asked in first {
            assert_eq!(outcomes[&asked.id].tokens, reference(&asked, 64, SLOTS as u32).0);
        }
    }
}

#[test]
fn as_many_are_preempted_as_memory_needs() {
    for chunked in [true, false] {
        let mut engine = engine(&with_chunks(chunked, 0, 8), SLOTS, 64);
        let (mut now, mut outcomes) = (Instant::now(), BTreeMap::new());
        // Four of 4 blocks each fill the memory; the better one needs 7 blocks for its prompt.
        (1..=4).for_each(|id| engine.submit(of_class(1, id, 13, 3), now));
        turns(&mut engine, &mut now, &mut outcomes, 2);
        engine.submit(of_class(0, 9, 26, 2), now);
        let Progress::Ran(stats) = turn(&mut engine, now, &mut outcomes) else { panic!() };
        assert_eq!((stats.batch.preempted, stats.batch.running), (2, 3));
        drain(&mut engine, &mut now, &mut outcomes);
        assert_eq!([1, 2, 3, 4, 9].map(|id| preemptions(&outcomes[&id])), [0, 0, 1, 1, 0]);
    }
}

/// Milliseconds after which a request of the worst class ends under a stream of the best that fills the engine, if it does.
fn ends_after(chunked: bool, aging_ms: u64) -> Option<u32> {
    let mut engine = engine(&with_chunks(chunked, aging_ms, 2), SLOTS, 64);
    let (mut now, mut outcomes) = (Instant::now(), BTreeMap::new());
    engine.submit(of_class(3, 1_000, 5, 10), now);
    for at in 0..600 {
        // Each takes 10 steps or so, and two run.
        if at % 4 == 0 {
            engine.submit(of_class(0, u64::from(at), 5, 10), now);
        }
        turns(&mut engine, &mut now, &mut outcomes, 1);
        if outcomes.get(&1_000).is_some_and(|outcome| outcome.end.is_some()) {
            return Some(at);
        }
    }
    None
}

#[test]
fn starvation_is_bounded_by_aging() {
    for chunked in [true, false] {
        // It begins before the first of the stream comes, and is preempted.
        assert_eq!(ends_after(chunked, 0), None);
        // Three classes to gain, then those that came before it had: the stream is of 2.5 times what the engine can do.
        let after = ends_after(chunked, 20).expect("an end");
        assert!((60..160).contains(&after), "{after}");
    }
}

/// Turns between the tokens of a request beside a stream of one-token requests of a class, two of which fill a step.
fn gaps_beside_one_token_requests(class: u8, aging_ms: u64) -> Vec<u32> {
    let mut engine = engine(&with_chunks(false, aging_ms, 8), 400, 64);
    let (mut now, mut outcomes) = (Instant::now(), BTreeMap::new());
    let asked = of_class(1, 1_000, 5, 6);
    engine.submit(asked.clone(), now);
    let (mut gaps, mut since, mut seen) = (Vec::new(), 0, 0);
    for at in 0..120 {
        for id in [2 * at, 2 * at + 1] {
            engine.submit(of_class(class, u64::from(id), 16, 1), now);
        }
        turns(&mut engine, &mut now, &mut outcomes, 1);
        let tokens = outcomes.get(&1_000).map_or(0, |outcome| outcome.tokens.len());
        if tokens > seen {
            gaps.push(at - since);
            (since, seen) = (at, tokens);
        }
    }
    drain(&mut engine, &mut now, &mut outcomes);
    assert_eq!(outcomes[&1_000].tokens, reference(&asked, 64, 400).0);
    gaps
}

#[test]
fn one_token_requests_hold_up_decodes_no_longer_than_aging() {
    for class in 0..3 {
        // Never, but for its first token, which its own prompt brings.
        assert!(gaps_beside_one_token_requests(class, 0).len() <= 1, "class {class}");
        // Of a better class than its own, the stream goes before its prompt until it has aged.
        let gaps = gaps_beside_one_token_requests(class, 7);
        assert_eq!(gaps.len(), 6, "class {class}: {gaps:?}");
        assert!(gaps[0] <= 8 && gaps[1..].iter().all(|gap| *gap == 8), "class {class}: {gaps:?}");
    }
}

#[test]
fn a_fork_that_is_admitted_as_its_source_is_preempted_takes_memory_of_its_own() {
    for chunked in [true, false] {
        let mut engine = engine(&with_chunks(chunked, 0, 8), 48, 64);
        let (mut now, mut outcomes) = (Instant::now(), BTreeMap::new());
        let source = of_class(2, 1, 21, 4);
        engine.submit(source.clone(), now);
        turns(&mut engine, &mut now, &mut outcomes, 2);
        // The fork would share 5 blocks; the other one has room only in place of the source, and then the fork shares none.
        let fork = Request { id: 2, priority: 0, fork_of: Some(1), ..source.clone() };
        let other = of_class(1, 3, 28, 4);
        [&fork, &other].iter().for_each(|request| engine.submit((*request).clone(), now));
        drain(&mut engine, &mut now, &mut outcomes);
        for asked in [source, fork, other] {
            assert_eq!(outcomes[&asked.id].tokens, reference(&asked, 64, 48).0);
        }
    }
}

#[test]
fn a_beam_that_may_have_to_copy_all_waits_until_it_can() {
    // Six blocks, all of them in use when the second beam is first computed: two of each beam, two of the other request.
    let (slots, config) = (24, EngineConfig { share_blocks: false, prefix_cache: true, ..config(0, 8) });
    let mut engine = engine(&config, slots, 64);
    let (mut now, mut outcomes) = (Instant::now(), BTreeMap::new());
    let beams = Request { beam: Some(BeamSearch::new(2)), ..of_class(1, 2, 7, 3) };
    engine.submit(of_class(0, 1, 6, 3), now);
    engine.submit(beams.clone(), now);
    turns(&mut engine, &mut now, &mut outcomes, 3);
    // The first beam's third block was the second's: preempted, that one would start with what the first and the cache hold of it.
    // The other request has ended. Who comes now takes the cached block, the one used least recently: then the beam copies three
    // blocks, and two are left.
    assert!(outcomes[&1].end.is_some());
    engine.submit(of_class(0, 3, 3, 1), now);
    let Progress::Ran(stats) = turn(&mut engine, now, &mut outcomes) else { panic!() };
    assert_eq!((stats.batch.running, stats.batch.waiting), (2, 1));
    drain(&mut engine, &mut now, &mut outcomes);
    assert_eq!(preemptions(&outcomes[&2]), 1);
    let found = outcomes[&2].hypotheses.iter().map(|found| (found.tokens.clone(), found.reason));
    assert_eq!(found.collect::<Vec<_>>(), search(&beams, 64, slots as u32));
}
