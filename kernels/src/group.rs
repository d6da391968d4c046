//! What the ranks of one model share on the host: where they wait for each other, and how one that fails ends the others'
//! wait.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use crate::KernelError;

/// The ranks of a model that is divided over several devices, each driven by a thread of its own.
#[derive(Debug)]
pub struct Group {
    ranks: usize,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    /// What the ranks that have come have brought.
    values: Vec<u64>,
    arrived: usize,
    /// What all of them brought the last time, and how often that was.
    last: Vec<u64>,
    rounds: u64,
    /// Why the first rank that failed did.
    failure: Option<String>,
}

impl Group {
    /// A group of so many ranks.
    pub fn new(ranks: usize) -> Self {
        let state = State { values: vec![0; ranks], arrived: 0, last: Vec::new(), rounds: 0, failure: None };
        Self { ranks, state: Mutex::new(state), changed: Condvar::new() }
    }

    /// How many they are.
    pub fn ranks(&self) -> usize {
        self.ranks
    }

    /// Brings a value and waits until every rank has: what all of them brought, by rank. Each calls it as often as the
    /// others do.
    ///
    /// # Errors
    /// When a rank has failed, then and from then on, with its reason.
    pub fn exchange(&self, rank: usize, value: u64) -> Result<Vec<u64>, KernelError> {
        let mut state = self.state();
        if let Some(why) = &state.failure {
            return Err(KernelError::Device(why.clone()));
        }
        let round = state.rounds;
        state.values[rank] = value;
        state.arrived += 1;
        if state.arrived == self.ranks {
            state.last = state.values.clone();
            state.arrived = 0;
            state.rounds += 1;
            self.changed.notify_all();
        }
        while state.rounds == round && state.failure.is_none() {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        match &state.failure {
            // A round that was complete counts, though a rank has failed since.
            Some(why) if state.rounds == round => Err(KernelError::Device(why.clone())),
            _ => Ok(state.last.clone()),
        }
    }

    /// Says that a rank has failed, for the first time; those that wait, and those that would, get this reason.
    pub fn fail(&self, why: &str) {
        self.state().failure.get_or_insert_with(|| why.to_string());
        self.changed.notify_all();
    }

    /// Why the first rank that failed did.
    pub fn failure(&self) -> Option<String> {
        self.state().failure.clone()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_rank_gets_what_all_brought() {
        let group = Group::new(3);
        std::thread::scope(|scope| {
            for rank in 0..3 {
                let group = &group;
                scope.spawn(move || {
                    for round in 0..1000 {
                        let value = |rank: usize| 10 * round + rank as u64;
                        let all = group.exchange(rank, value(rank)).unwrap();
                        assert_eq!(all, [value(0), value(1), value(2)]);
                    }
                });
            }
        });
    }

    #[test]
    fn a_rank_that_fails_ends_the_wait_of_the_others() {
        let group = Group::new(2);
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| group.exchange(0, 1).unwrap_err().to_string());
            group.fail("the second has no memory");
            group.fail("and something else");
            assert_eq!(waiting.join().unwrap(), "the second has no memory");
        });
        for rank in [1, 0, 1] {
            assert!(group.exchange(rank, 1).is_err(), "nor does anybody wait later");
        }
    }
}
