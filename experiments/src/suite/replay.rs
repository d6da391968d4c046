//! Counts of scripted workloads, which are the same on every machine: what the scheduler did, not how fast.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use quire_engine::{BeamSearch, Engine, Event, KvLayout, Progress, Request, SamplingParams, StepStats};
use quire_kernels::generated::mix;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::config::ReplayEntry;
use super::scripted::{ScriptedExecutor, VOCAB};

/// Counts by name; what never happened is left out.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Counts(pub BTreeMap<String, u64>);

impl Counts {
    /// A count; 0 when it was left out.
    pub fn get(&self, name: &str) -> u64 {
        self.0.get(name).copied().unwrap_or(0)
    }

    fn add(&mut self, name: &str, count: u64) {
        if count > 0 {
            *self.0.entry(name.to_string()).or_default() += count;
        }
    }

    fn raise(&mut self, name: &str, to: u64) {
        if to > self.get(name) {
            self.0.insert(name.to_string(), to);
        }
    }

    fn add_step(&mut self, step: &StepStats, slots_a_block: u64) {
        let batch = &step.batch;
        let held = (batch.kv.total() - batch.kv.free - batch.kv.cached) / slots_a_block;
        for (name, count) in [
            ("steps", 1),
            ("prefill_tokens", batch.prefill_tokens.into()),
            ("decode_tokens", batch.decode_tokens.into()),
            ("drafted_tokens", batch.drafted_tokens.into()),
            ("accepted_tokens", batch.accepted_tokens.into()),
            ("padding_tokens", batch.padding_tokens.into()),
            ("preemptions", batch.preempted.into()),
            ("swapped_out", batch.swapped_out.into()),
            ("swapped_in", batch.swapped_in.into()),
            // Blocks in use, summed over steps; where there are no blocks, slots.
            ("block_steps", held),
        ] {
            self.add(name, count);
        }
        self.raise("peak_blocks", held);
        self.raise("peak_running", batch.running.into());
    }
}

/// Turns of the loop in which a replay must end, for each token there is.
const TURNS_A_TOKEN: u64 = 8;

/// Serves a scripted workload to its end and counts what was done.
///
/// # Errors
/// When the engine's settings do not work, or the workload does not end.
pub fn replay(entry: &ReplayEntry) -> Result<Counts> {
    serve(entry).with_context(|| format!("replay `{}`", entry.name))
}

fn serve(entry: &ReplayEntry) -> Result<Counts> {
    let rows = entry.engine.scheduler.token_budget;
    let executor = ScriptedExecutor::new(entry.kv_slots, entry.max_model_len(), rows);
    let mut engine = Engine::new(executor, &entry.engine)?;
    let requests = requests(entry);
    let tokens: u64 = requests.iter().map(|r| r.prompt.len() as u64 + u64::from(r.max_tokens)).sum();
    let most = u64::from(entry.every) * u64::from(entry.prompts) + TURNS_A_TOKEN * tokens + 10_000;
    let slots_a_block = match entry.engine.kv {
        KvLayout::Paged { block_size } => u64::from(block_size),
        KvLayout::Contiguous { .. } => 1,
    };
    let mut coming = (0u64..).zip(requests).peekable();
    let mut counts = Counts::default();
    let mut outputs: BTreeMap<u64, Vec<u32>> = BTreeMap::new();
    // Policies see a clock that goes by turns, a millisecond each.
    let mut now = Instant::now();
    for turn in 0.. {
        let due = |index: u64| index / u64::from(entry.samples) * u64::from(entry.every) <= turn;
        while let Some((_, request)) = coming.next_if(|(index, _)| due(*index)) {
            engine.submit(request, now);
        }
        if coming.peek().is_none() && !engine.has_work() {
            break;
        }
        if turn > most {
            bail!("no end after {turn} turns of the loop, with {engine:?}");
        }
        let output = engine.step(now)?;
        for event in output.events {
            match event {
                Event::Token { id, sampled } => outputs.entry(id).or_default().push(sampled.token),
                Event::Finished { cached_tokens, .. } => {
                    counts.add("finished", 1);
                    counts.add("cached_tokens", cached_tokens.into());
                }
                Event::Rejected { .. } => counts.add("rejected", 1),
                Event::Cancelled { .. } => counts.add("cancelled", 1),
                Event::Hypotheses { id, hypotheses } => {
                    let all = outputs.entry(id).or_default();
                    hypotheses.iter().for_each(|found| all.extend(&found.tokens));
                }
            }
        }
        if let Progress::Ran(step) = output.progress {
            counts.add_step(&step, slots_a_block);
        }
        now += Duration::from_millis(1);
    }
    engine.check_integrity();
    counts.add("copied_tokens", engine.executor().copied);
    counts.add("output_tokens", outputs.values().map(|tokens| tokens.len() as u64).sum());
    counts.add("outputs_hash", hash(&outputs));
    Ok(counts)
}

/// The first 32 bits of a hash of all outputs: a count that tells whether any token changed.
fn hash(outputs: &BTreeMap<u64, Vec<u32>>) -> u64 {
    let mut sha = Sha256::new();
    for (id, tokens) in outputs {
        sha.update(id.to_le_bytes());
        tokens.iter().for_each(|token| sha.update(token.to_le_bytes()));
    }
    let digest = sha.finalize();
    digest[..4].iter().fold(0, |bits, &byte| bits << 8 | u64::from(byte))
}

/// The workload, in the order of arrival. All of it follows from the entry by arithmetic on integers.
fn requests(entry: &ReplayEntry) -> Vec<Request> {
    let (sampling, no_stops): (Arc<SamplingParams>, Arc<[u32]>) = (Arc::default(), Arc::from([]));
    let drawn = |key: u64, [low, high]: [u32; 2]| low + (mix(key) % u64::from(high - low + 1)) as u32;
    let of_prompt = |index: u64| {
        let prompt_len = drawn(4 * index, entry.prompt);
        let own = (0..u64::from(prompt_len)).map(move |at| mix(index << 32 | at | 1 << 31));
        let shared = (0..u64::from(entry.shared_prefix)).map(mix);
        shared.chain(own).map(|bits| (bits % u64::from(VOCAB)) as u32).collect::<Vec<u32>>()
    };
    let samples = u64::from(entry.samples);
    let request = |id: u64| {
        let (index, sample) = (id / samples, id % samples);
        let output = drawn(4 * id + 1, entry.output);
        Request {
            id,
            prompt: of_prompt(index),
            max_tokens: entry.output[1],
            true_output_len: (entry.beams == 0).then_some(output),
            stop_tokens: no_stops.clone(),
            sampling: sampling.clone(),
            fork_of: (sample > 0).then_some(index * samples),
            beam: (entry.beams > 0).then(|| BeamSearch::new(entry.beams)),
            priority: (index % u64::from(entry.classes)) as u8,
            cache_salt: 0,
        }
    };
    (0..u64::from(entry.prompts) * samples).map(request).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(text: &str) -> ReplayEntry {
        let base =
            "name = 'a'\nprompts = 12\nevery = 2\nprompt = [5, 40]\noutput = [3, 30]\nkv_slots = 2048\n";
        toml::from_str(&format!("{base}{text}")).unwrap()
    }

    #[test]
    fn a_replay_counts_the_same_every_time_and_all_of_its_work() {
        let entry = entry("");
        let counts = replay(&entry).unwrap();
        assert_eq!(counts, replay(&entry).unwrap());
        let all = requests(&entry);
        let prompts: u64 = all.iter().map(|r| r.prompt.len() as u64).sum();
        let outputs: u64 = all.iter().map(|r| u64::from(r.true_output_len.unwrap())).sum();
        assert_eq!(counts.get("prefill_tokens"), prompts);
        assert_eq!(counts.get("output_tokens"), outputs);
        // The first token of each comes of its prompt.
        assert_eq!(counts.get("decode_tokens"), outputs - 12);
        assert_eq!((counts.get("finished"), counts.get("preemptions")), (12, 0));
    }

    #[test]
    fn outputs_are_those_of_any_other_settings() {
        let plain = replay(&entry("")).unwrap();
        let small = replay(&entry("[engine.scheduler]\ntoken_budget = 4")).unwrap();
        assert_eq!(plain.get("outputs_hash"), small.get("outputs_hash"));
        assert!(small.get("steps") > plain.get("steps"), "a smaller budget takes more steps");
        let mut tight = entry("");
        tight.kv_slots = 96;
        let tight = replay(&tight).unwrap();
        assert!(tight.get("preemptions") > 0 && tight.get("prefill_tokens") > plain.get("prefill_tokens"));
        assert_eq!(plain.get("outputs_hash"), tight.get("outputs_hash"));
    }

    #[test]
    fn samples_share_their_prompt_and_proposals_are_accepted() {
        let forks = replay(&entry("samples = 3")).unwrap();
        assert!(forks.get("copied_tokens") > 0);
        assert_eq!(forks.get("finished"), 36);
        let beams = replay(&entry("beams = 4")).unwrap();
        assert_eq!((beams.get("finished"), beams.get("output_tokens")), (12, 12 * 4 * 30));
        assert!(
            beams.get("copied_tokens") > 0 && beams.get("prefill_tokens") == forks.get("prefill_tokens") - 24
        );
        let drafts =
            "[engine.speculation]\ndrafter = { kind = 'n_gram' }\nlength = { kind = 'fixed', tokens = 3 }";
        let drafts = replay(&entry(drafts)).unwrap();
        assert!(
            drafts.get("accepted_tokens") > 0 && drafts.get("accepted_tokens") < drafts.get("drafted_tokens")
        );
        assert_eq!(drafts.get("outputs_hash"), replay(&entry("")).unwrap().get("outputs_hash"));
    }
}
