//! Sums over the ranks of a model whose layers are divided over groups of threads.

use std::sync::{Arc, PoisonError, RwLock};

use crate::KernelError;
use crate::group::Group;

/// Ranks on the CPU and what they hand each other.
#[derive(Debug)]
pub struct CpuGroup {
    group: Group,
    parts: Vec<RwLock<Vec<f32>>>,
}

impl CpuGroup {
    /// A group of so many ranks.
    pub fn new(ranks: usize) -> Arc<Self> {
        let parts = (0..ranks).map(|_| RwLock::default()).collect();
        Arc::new(Self { group: Group::new(ranks), parts })
    }

    /// Where its ranks meet.
    pub fn group(&self) -> &Group {
        &self.group
    }

    /// Sums `values` over the ranks, in the order of their numbers, so that all of them get the same bits.
    pub(super) fn all_reduce(&self, rank: usize, values: &mut [f32]) -> Result<(), KernelError> {
        {
            let mut own = self.parts[rank].write().unwrap_or_else(PoisonError::into_inner);
            own.clear();
            own.extend_from_slice(values);
        }
        self.group.exchange(rank, 0)?;
        values.fill(0.0);
        for part in &self.parts {
            let part = part.read().unwrap_or_else(PoisonError::into_inner);
            values.iter_mut().zip(part.iter()).for_each(|(sum, value)| *sum += value);
        }
        // Until all have read it, nobody writes to its part again.
        self.group.exchange(rank, 0).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_ranks_get_the_sum() {
        let group = CpuGroup::new(3);
        std::thread::scope(|scope| {
            for rank in 0..3 {
                let group = &group;
                scope.spawn(move || {
                    for round in 0..100 {
                        let mut values = vec![(rank + round) as f32; 7 + round];
                        group.all_reduce(rank, &mut values).unwrap();
                        assert_eq!(values, vec![(3 + 3 * round) as f32; 7 + round]);
                    }
                });
            }
        });
    }
}
