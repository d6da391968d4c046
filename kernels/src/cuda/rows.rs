//! Rows of logits on the host, for what has no kernel.

use super::backend::CudaBackend;
use super::device::{Device, Pinned};
use super::memory::CudaBuffer;
use crate::KernelError;

/// What the memory is called when it cannot be had.
const WHAT: &str =
    "logits on the host (pinned memory): ask for fewer top_logprobs or narrower beams at a time";

/// Reads rows of logits through pinned memory, taken when rows are first read and kept for the next.
#[derive(Debug)]
pub struct RowReader {
    memory: Option<Pinned<f32>>,
    most: usize,
}

impl RowReader {
    /// With memory for up to `most` rows at a time.
    pub fn new(most: usize) -> Self {
        Self { memory: None, most: most.max(1) }
    }

    /// Gives `each` the index in `rows` and the logits of each of these rows, which ascend, when all that was queued before
    /// is done.
    ///
    /// # Errors
    /// When memory cannot be had, a row is not in the buffer, or the device failed.
    pub fn read(
        &mut self,
        device: &Device,
        logits: &CudaBuffer,
        rows: &[usize],
        mut each: impl FnMut(usize, &mut [f32]),
    ) -> Result<(), KernelError> {
        let (cols, base, most) = (logits.cols, CudaBackend::logits_ptr(logits), self.most);
        if let Some(row) = rows.iter().find(|&&row| row >= logits.capacity) {
            return Err(KernelError::Shape(format!("row {row} of {} rows of logits", logits.capacity)));
        }
        for (index, piece) in rows.chunks(most).enumerate() {
            let memory = self.room(device, piece.len(), cols)?;
            let mut at = 0;
            for run in runs(piece) {
                let len = run.len() * cols;
                device.download_pinned(base + 4 * (run[0] * cols) as u64, memory, at..at + len);
                at += len;
            }
            device.synchronize()?;
            let values = memory.values_mut()[..at].chunks_exact_mut(cols);
            values.enumerate().for_each(|(row, values)| each(index * most + row, values));
        }
        Ok(())
    }

    /// The memory, with room for so many rows; it grows by doubling.
    fn room(&mut self, device: &Device, rows: usize, cols: usize) -> Result<&mut Pinned<f32>, KernelError> {
        let enough = self.memory.take().filter(|memory| memory.len() >= rows * cols);
        let memory = match enough {
            Some(memory) => memory,
            None => device.pinned(rows.next_power_of_two().min(self.most) * cols, WHAT)?,
        };
        Ok(self.memory.insert(memory))
    }
}

/// Rows that follow one another.
fn runs(rows: &[usize]) -> impl Iterator<Item = &[usize]> {
    rows.chunk_by(|a, b| a + 1 == *b)
}

#[cfg(test)]
mod tests {
    use super::runs;

    #[test]
    fn rows_that_follow_one_another_are_copied_at_once() {
        let found: Vec<_> = runs(&[0, 1, 4, 6, 7, 8]).collect();
        assert_eq!(found, [&[0, 1][..], &[4], &[6, 7, 8]]);
        assert_eq!(runs(&[]).count(), 0);
    }
}
