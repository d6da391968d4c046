//! Proposals that mean nothing, for experiments on systems: what is accepted is drawn
//! ([`Acceptance::Synthetic`](super::Acceptance::Synthetic)).

use super::{DraftContext, DraftTarget, Drafter};
use crate::EngineError;

#[derive(Debug, Default)]
pub(super) struct Synthetic {
    vocab: u64,
}

impl Drafter for Synthetic {
    fn prepare(&mut self, target: DraftTarget<'_>) -> Result<(), EngineError> {
        self.vocab = target.executor.vocab_size() as u64;
        Ok(())
    }

    fn propose(&mut self, context: DraftContext<'_>, most: u32, drafts: &mut Vec<u32>) {
        let start = context.tokens.len() as u64;
        let token = |i| quire_kernels::generated::mix(context.id ^ ((start + i) << 32)) % self.vocab;
        drafts.extend((0..u64::from(most)).map(|i| token(i) as u32));
    }
}
