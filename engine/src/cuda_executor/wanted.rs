//! What clients want to know of a row beside the token that the device chooses.

use super::CudaExecutor;
use crate::sampling::top_logprobs;
use crate::{EngineError, SampleRow, TokenLogprob};

/// What is wanted of a row beside its token.
#[derive(Debug)]
pub(super) struct Wanted {
    pub(super) logprob: bool,
    pub(super) top: Option<Box<[TokenLogprob]>>,
}

impl CudaExecutor {
    /// What these rows want beside tokens. The most probable tokens are found on the host, which waits for the logits: rare
    /// enough (beams, and clients that ask for alternatives) not to have a kernel. Sampling, which leaves the logits as they
    /// are, may be queued before.
    pub(super) fn wanted_of(&mut self, rows: &[SampleRow]) -> Result<Vec<Wanted>, EngineError> {
        let mut wanted: Vec<Wanted> =
            rows.iter().map(|row| Wanted { logprob: row.params.logprobs, top: None }).collect();
        let numbered = rows.iter().enumerate();
        let read: Vec<usize> =
            numbered.filter(|(_, row)| row.params.top_logprobs > 0).map(|(index, _)| index).collect();
        if !read.is_empty() {
            let Self { row_reader, backend, model, host_sampler, .. } = self;
            row_reader.read(backend.device(), model.logits(), &read, |index, logits| {
                let row = read[index];
                wanted[row].top = Some(top_logprobs(host_sampler, logits, rows[row].params.top_logprobs));
            })?;
        }
        Ok(wanted)
    }
}
