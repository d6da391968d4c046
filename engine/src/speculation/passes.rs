//! Proposals by forward passes: one token of every sequence a pass.

use crate::{EngineError, Sampled, ScheduledBatch};

/// Computes the proposals of `batch` from the one at `from` (0 is the first) on, each in a pass of `run`, which executes a
/// batch and samples its `logit_rows`.
pub(super) fn propose_from(
    batch: &mut ScheduledBatch,
    from: u32,
    run: &mut dyn FnMut(&ScheduledBatch) -> Result<Vec<Sampled>, EngineError>,
) -> Result<(), EngineError> {
    let most = batch.drafts.iter().map(|span| span.drafted).max().unwrap_or(0);
    if from >= most {
        return Ok(());
    }
    let mut pass = ScheduledBatch::new(batch.kv.clone());
    for index in from..most {
        pass.clear();
        for span in batch.drafts.iter().filter(|span| span.drafted > index) {
            let row = (span.row + index) as usize;
            let sampling = batch.sampling[(span.sample + index) as usize].clone();
            pass.add_rows_of(
                batch,
                span.sequence,
                batch.positions[row],
                &batch.tokens[row..=row],
                Some(sampling),
            );
        }
        let sampled = run(&pass)?;
        put(batch, index, &sampled);
    }
    Ok(())
}

/// Puts the tokens sampled for the spans with more than `index` proposals in their places.
fn put(batch: &mut ScheduledBatch, index: u32, sampled: &[Sampled]) {
    let spans: Vec<usize> =
        (0..batch.drafts.len()).filter(|&span| batch.drafts[span].drafted > index).collect();
    for (span, sampled) in spans.into_iter().zip(sampled) {
        batch.set_draft(span, index, sampled.token);
    }
}
