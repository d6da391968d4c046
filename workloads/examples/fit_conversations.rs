//! Finds the conversations of a trace whose requests say which blocks of their prompts are equal, and prints what a panel
//! draws them from, as TOML: `cargo run --release -p quire-workloads --example fit_conversations -- mooncake.jsonl`
//!
//! A request goes on with an earlier one when it begins with all full blocks of that one's prompt, two or more, and is
//! longer. What it adds is its length less that one's prompt and answer. Conversations that began before the trace did, or
//! go on after it, are counted as far as it shows them.

use std::collections::HashMap;
use std::error::Error;
use std::path::PathBuf;

use quire_workloads::trace::{ReadOptions, Trace};

const PROBABILITIES: [f64; 14] = [0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0];
/// Longer conversations are too few for weights of their own.
const MOST_TURNS: usize = 20;

fn main() -> Result<(), Box<dyn Error>> {
    let path = PathBuf::from(std::env::args_os().nth(1).ok_or("usage: fit_conversations TRACE")?);
    let trace = Trace::load(&path, &ReadOptions::default())?;
    let before = predecessors(&trace);
    let shared = shared_by_all(&trace);
    let (mut first, mut later) = (Lengths::default(), Lengths::default());
    let (mut turns, mut gaps) = (vec![1_usize; trace.requests.len()], Vec::new());
    for (i, request) in trace.requests.iter().enumerate() {
        let Some(old) = before[i] else {
            first.add(request.input_len.saturating_sub(shared), request.output_len);
            continue;
        };
        turns[i] = turns[old] + 1;
        let said = &trace.requests[old];
        later.add(request.input_len.saturating_sub(said.input_len + said.output_len), request.output_len);
        gaps.push(request.arrival_s - said.arrival_s);
    }
    gaps.sort_by(f64::total_cmp);
    // Of every conversation only its last turn counts.
    before.iter().flatten().for_each(|&old| turns[old] = 0);
    let mut weights = vec![0_u32; MOST_TURNS];
    turns.iter().filter(|count| **count > 0).for_each(|count| weights[(*count).min(MOST_TURNS) - 1] += 1);
    println!("# {} conversations of {} requests", weights.iter().sum::<u32>(), trace.requests.len());
    if let Some(median) = gaps.get(gaps.len() / 2) {
        println!("# median time from one turn's arrival to the next one's: {median} s");
    }
    println!("shared_prefix = {shared}\n# first turns");
    first.print();
    println!("# turns and later turns\nweights = {weights:?}");
    later.print();
    Ok(())
}

/// The request with which each goes on.
fn predecessors(trace: &Trace) -> Vec<Option<usize>> {
    let mut last: HashMap<u64, usize> = HashMap::new();
    let mut found = Vec::with_capacity(trace.requests.len());
    for (i, request) in trace.requests.iter().enumerate() {
        let blocks = request.prefix.as_ref().map_or(&[][..], |prefix| &prefix.ids);
        // An id stands for all blocks up to its own.
        let longest = blocks.iter().enumerate().rev().find_map(|(k, id)| Some((k + 1, *last.get(id)?)));
        found.push(longest.filter(|&(equal, old)| {
            let old = &trace.requests[old];
            let block_len = old.prefix.as_ref().map_or(u32::MAX, |prefix| prefix.block_len);
            equal >= 2 && equal >= (old.input_len / block_len) as usize && request.input_len > old.input_len
        }));
        last.extend(blocks.iter().map(|&id| (id, i)));
    }
    found.into_iter().map(|longest| longest.map(|(_, old)| old)).collect()
}

/// Tokens of the first block, where nearly all prompts begin with it.
fn shared_by_all(trace: &Trace) -> u32 {
    let mut counts: HashMap<(u64, u32), usize> = HashMap::new();
    for prefix in trace.requests.iter().filter_map(|request| request.prefix.as_ref()) {
        if let Some(&id) = prefix.ids.first() {
            *counts.entry((id, prefix.block_len)).or_default() += 1;
        }
    }
    let most = counts.into_iter().max_by_key(|(_, count)| *count);
    most.filter(|(_, count)| *count * 100 > trace.requests.len() * 99).map_or(0, |((_, len), _)| len)
}

#[derive(Default)]
struct Lengths {
    input: Vec<u32>,
    output: Vec<u32>,
}

impl Lengths {
    fn add(&mut self, input: u32, output: u32) {
        self.input.push(input.max(1));
        self.output.push(output);
    }

    fn print(mut self) {
        for (name, lengths) in [("input", &mut self.input), ("output", &mut self.output)] {
            lengths.sort_unstable();
            let Some(last) = lengths.len().checked_sub(1) else { return println!("# {name}: none") };
            let at = |p: f64| lengths[(p * last as f64).round() as usize];
            let points: Vec<String> =
                PROBABILITIES.iter().map(|&p| format!("[{p:?}, {:?}]", f64::from(at(p)))).collect();
            println!("{name} = {{ kind = \"empirical\", quantiles = [{}] }}", points.join(", "));
        }
    }
}
