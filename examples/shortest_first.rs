//! A scheduling policy of one's own, drawn into the figure of tail latency against throughput (fig10) as a line beside the
//! figure's own:
//!
//! ```text
//! cargo run --release --example shortest_first -- \
//!     configs/fig10.toml --with examples/shortest_first.toml --quick
//! ```
//!
//! Nothing of Quire is changed: the policy plugs in through the public API, and the program is otherwise the `experiment`
//! command. `examples/shortest_first.toml` has the line: an engine, whose policy this program gives. It goes with other
//! configurations as well.

use std::process::ExitCode;

use clap::Parser;
use quire_engine::EngineParts;
use quire_engine::policy::{Plan, SchedulerPolicy, SchedulerView, SeqView};
use quire_experiments::{cli::Cli, commands};

/// Continuous batching that gives rows and memory to the shortest prompts first: good for the mean time to the first
/// token, and unfair, since long prompts wait as long as short ones come.
struct ShortestFirst;

impl SchedulerPolicy for ShortestFirst {
    fn plan(&mut self, view: &SchedulerView<'_>, plan: &mut Plan) {
        // A copy of the KV memory's books: what succeeds on it succeeds when the plan is applied.
        let mut kv = view.kv_trial();
        let mut budget = view.token_budget();

        // Every decode first, oldest first; who came last gives way when memory is short.
        let mut alive = view.running_len();
        let mut next = 0;
        while next < alive && budget > 0 {
            let sequence = view.running(next);
            next += 1;
            if sequence.pending() != 1 {
                continue;
            }
            while !kv.grow(&sequence, sequence.len) {
                alive -= 1;
                let victim = view.running(alive);
                plan.preempt.push(victim.key);
                kv.release(&victim);
                if victim.key == sequence.key {
                    return;
                }
            }
            plan.run.push((sequence.key, 1));
            budget -= 1;
        }

        // Then prompts, the shortest first: those under way, and new ones as long as there is room.
        let mut prompts: Vec<(SeqView, bool)> = (0..alive).map(|i| (view.running(i), false)).collect();
        prompts.retain(|(sequence, _)| sequence.pending() > 1);
        if plan.preempt.is_empty() {
            prompts.extend(view.waiting().map(|sequence| (sequence, true)));
        }
        prompts.sort_by_key(|(sequence, _)| sequence.pending());
        let mut running = alive;
        for (sequence, is_new) in prompts {
            if budget == 0 {
                return;
            }
            if is_new {
                if running == view.max_running() || !kv.admit(&sequence, sequence.len, 0) {
                    continue;
                }
                plan.admit.push(sequence.key);
                running += 1;
            }
            let tokens = sequence.pending().min(budget);
            plan.run.push((sequence.key, tokens));
            budget -= tokens;
        }
    }
}

fn main() -> ExitCode {
    let policy = || EngineParts { policy: Some(Box::new(ShortestFirst)), drafter: None };
    match commands::run_with(Cli::parse(), |experiment| experiment.engine_parts("shortest_first", policy)) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(2)
        }
    }
}
