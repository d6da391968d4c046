//! What clients want to know of a row beside the token that the device chooses.

use super::CudaExecutor;
use crate::sampling::top_logprobs;
use crate::{EngineError, ModelExecutor, SampleRow, TokenLogprob};

/// What is wanted of a row beside its token.
#[derive(Debug)]
pub(super) struct Wanted {
    pub(super) logprob: bool,
    pub(super) top: Option<Box<[TokenLogprob]>>,
}

impl CudaExecutor {
    /// What these rows want beside tokens. The most probable tokens are found on the host, which waits for the logits: rare
    /// enough (beams, and clients that ask for alternatives) not to have a kernel.
    pub(super) fn wanted_of(&mut self, rows: &[SampleRow]) -> Result<Vec<Wanted>, EngineError> {
        let mut wanted: Vec<Wanted> =
            rows.iter().map(|row| Wanted { logprob: row.params.logprobs, top: None }).collect();
        if rows.iter().any(|row| row.params.top_logprobs > 0) {
            let vocab = self.info.config.vocab;
            let mut logits = self.logits()?.into_owned();
            for ((row, logits), wanted) in rows.iter().zip(logits.chunks_exact_mut(vocab)).zip(&mut wanted) {
                if row.params.top_logprobs > 0 {
                    wanted.top = Some(top_logprobs(&self.host_sampler, logits, row.params.top_logprobs));
                }
            }
        }
        Ok(wanted)
    }
}
