//! The engine's loop without a device, to count what the host computes in a step.

use std::sync::Arc;
use std::time::Instant;

use anyhow::{Result, bail};
use quire_engine::{
    Engine, EngineError, Executor, KvCopy, KvLayout, Progress, Request, SampleRow, Sampled, SampledQueue,
    ScheduledBatch,
};

use super::config::PathEntry;

/// Tokens that a sequence may grow by.
const GROWTH: u32 = 1024;
/// Sequences differ by up to so many tokens, so that as many take a new block in every step.
const SPREAD: u32 = 16;

/// An executor that does nothing.
#[derive(Debug)]
struct Nothing {
    slots: usize,
    max_model_len: usize,
    rows: usize,
    queue: SampledQueue,
}

impl Executor for Nothing {
    fn kv_slots(&self) -> usize {
        self.slots
    }
    fn max_model_len(&self) -> usize {
        self.max_model_len
    }
    fn vocab_size(&self) -> usize {
        2
    }
    fn max_batch_rows(&self) -> usize {
        self.rows
    }
    fn prepare(&mut self, _: KvLayout, _: &mut dyn FnMut(usize, usize)) -> Result<(), EngineError> {
        Ok(())
    }
    fn copy_kv(&mut self, _: &[KvCopy]) -> Result<(), EngineError> {
        Ok(())
    }
    fn forward(&mut self, _: &ScheduledBatch) -> Result<(), EngineError> {
        Ok(())
    }
    fn sample(&mut self, rows: &[SampleRow]) -> Result<(), EngineError> {
        self.queue.push(vec![Sampled { token: 1, logprob: None, top: None }; rows.len()])
    }
    fn collect(&mut self) -> Result<Vec<Sampled>, EngineError> {
        self.queue.pop()
    }
}

/// Brings an engine to where all sequences decode, and makes `steps` steps from there: schedule, commit and events, with an
/// executor that does nothing.
///
/// # Errors
/// When the engine's settings do not let all sequences run together for so long.
pub fn walk(entry: &PathEntry, steps: u32) -> Result<()> {
    let max_model_len = entry.context + SPREAD + GROWTH;
    let executor = Nothing {
        slots: (entry.sequences * max_model_len) as usize,
        max_model_len: max_model_len as usize,
        rows: entry.engine.scheduler.token_budget as usize,
        queue: SampledQueue::default(),
    };
    let mut engine = Engine::new(executor, &entry.engine)?;
    let now = Instant::now();
    for id in 0..entry.sequences {
        engine.submit(request(id, entry.context + id % SPREAD), now);
    }
    let decodes = |progress: &Progress| match progress {
        Progress::Ran(step) => step.batch.decode_tokens == entry.sequences && step.batch.prefill_tokens == 0,
        Progress::Began | Progress::Idle { .. } => false,
    };
    let mut warm = false;
    for _ in 0..GROWTH / 2 {
        warm = decodes(&engine.step(now)?.progress);
        if warm {
            break;
        }
    }
    if !warm {
        bail!("path `{}`: the sequences do not come to run together: raise token_budget", entry.name);
    }
    for _ in 0..steps {
        if !decodes(&engine.step(now)?.progress) {
            bail!("path `{}`: a step is not of all sequences", entry.name);
        }
    }
    Ok(())
}

fn request(id: u32, prompt: u32) -> Request {
    Request {
        id: id.into(),
        prompt: vec![0; prompt as usize],
        max_tokens: GROWTH,
        true_output_len: None,
        stop_tokens: Arc::from([]),
        sampling: Arc::default(),
        fork_of: None,
        beam: None,
        priority: 0,
        cache_salt: id.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_sequences_decode_in_every_step_that_counts() {
        let text = "name = 'a'\nsequences = 20\ncontext = 30\nmax_instructions = 1\nmax_regression = 0";
        let entry: PathEntry = toml::from_str(text).unwrap();
        walk(&entry, 40).unwrap();
        let few: PathEntry =
            toml::from_str(&format!("{text}\n[engine.scheduler]\nmax_running = 10")).unwrap();
        assert!(walk(&few, 1).unwrap_err().to_string().contains("do not come to run together"));
    }
}
