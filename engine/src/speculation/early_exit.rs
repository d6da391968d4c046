//! Self-speculation: the model's first layers propose, all of them verify.

use super::passes::propose_from;
use super::{DraftContext, DraftTarget, Drafter};
use crate::{EngineError, Executor, ScheduledBatch};

/// Proposes what the model's output head makes of the hidden state after its first layers. They share weights and KV
/// memory with the verification, which computes the same K and V of these layers again.
#[derive(Debug)]
pub(super) struct EarlyExit {
    layers: usize,
}

impl EarlyExit {
    pub(super) fn new(layers: u32) -> Self {
        Self { layers: layers as usize }
    }
}

impl Drafter for EarlyExit {
    fn prepare(&mut self, target: DraftTarget<'_>) -> Result<(), EngineError> {
        let layers = self.layers;
        let problem = match target.executor.layers() {
            None => "this executor cannot leave its model early: choose another drafter".into(),
            Some(known) if layers == 0 || layers >= known => {
                format!("drafter.layers is {layers}: choose 1 to {}, fewer than the model has", known - 1)
            }
            Some(_) => return Ok(()),
        };
        Err(EngineError::Config(format!("speculation: {problem}")))
    }

    fn propose(&mut self, _context: DraftContext<'_>, most: u32, drafts: &mut Vec<u32>) {
        drafts.extend((0..most).map(|_| 0));
    }

    fn complete(
        &mut self,
        executor: &mut dyn Executor,
        batch: &mut ScheduledBatch,
    ) -> Result<(), EngineError> {
        propose_from(batch, 0, &mut |pass| {
            executor.forward_layers(pass, self.layers)?;
            executor.sample(&pass.sampling)?;
            executor.collect()
        })
    }
}
