//! What keeps a capture, and what other threads ask of the same card, apart.
//!
//! Calls by other threads have ended captures on the same card, though their mode is to allow them: the capturing stream
//! then reports `CUDA_ERROR_STREAM_CAPTURE_INVALIDATED` (docs/gpu-checks.md). A call that waits for the whole card does so;
//! which others wait is not documented. So a thread captures while no other one of this process takes or gives back memory,
//! loads code, or opens or closes a library's handle on that card, and these calls wait until a capture is over. Launches
//! and copies do neither: serving never takes the lock.

use std::cell::Cell;
use std::collections::HashMap;
use std::sync::{Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

thread_local! {
    /// Whether this thread is capturing. It has the lock then, and must not ask for it again.
    static CAPTURING: Cell<bool> = const { Cell::new(false) };
}

/// The lock of one card: shared by calls, exclusive to a capture.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Captures(&'static RwLock<()>);

impl Captures {
    /// That of GPU number `ordinal`, of which there is one in a process: it stays.
    pub(super) fn on(ordinal: usize) -> Self {
        static CARDS: Mutex<Option<HashMap<usize, &'static RwLock<()>>>> = Mutex::new(None);
        let mut cards = CARDS.lock().unwrap_or_else(PoisonError::into_inner);
        let cards = cards.get_or_insert_default();
        Self(cards.entry(ordinal).or_insert_with(|| Box::leak(Box::default())))
    }

    /// No capture by another thread begins while this is held, which is to be for the length of one call: a thread that
    /// asks for a second one could wait for a capture that waits for its first. Nothing where this thread captures: the
    /// driver refuses its call.
    pub(crate) fn hold_off(self) -> Option<RwLockReadGuard<'static, ()>> {
        (!CAPTURING.get()).then(|| self.0.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Makes this the thread that captures, once all calls that are under way are done.
    pub(crate) fn begin(self) -> Capturing {
        assert!(!CAPTURING.get(), "a capture within a capture");
        let lock = self.0.write().unwrap_or_else(PoisonError::into_inner);
        CAPTURING.set(true);
        Capturing(lock)
    }
}

/// A capture by this thread, over when it is dropped.
pub(crate) struct Capturing(#[expect(dead_code, reason = "held, not read")] RwLockWriteGuard<'static, ()>);

impl Drop for Capturing {
    fn drop(&mut self) {
        CAPTURING.set(false);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

    use super::Captures;

    #[test]
    fn a_capture_and_other_threads_calls_exclude_each_other() {
        let (calls, capturing) = (AtomicU32::new(0), AtomicBool::new(false));
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..500 {
                        let _held_off = Captures::on(1_000_000).hold_off();
                        calls.fetch_add(1, Ordering::SeqCst);
                        assert!(!capturing.load(Ordering::SeqCst));
                        calls.fetch_sub(1, Ordering::SeqCst);
                    }
                });
            }
            scope.spawn(|| {
                for _ in 0..500 {
                    let captures = Captures::on(1_000_000);
                    let _capturing = captures.begin();
                    capturing.store(true, Ordering::SeqCst);
                    assert_eq!(calls.load(Ordering::SeqCst), 0);
                    // Its own call does not wait for itself.
                    assert!(captures.hold_off().is_none());
                    capturing.store(false, Ordering::SeqCst);
                }
            });
        });
    }

    /// One that panics leaves nothing behind, and another card's captures are its own.
    #[test]
    fn a_capture_that_panics_is_over() {
        let captures = Captures::on(1_000_001);
        let panicked = std::thread::spawn(move || {
            let _capturing = captures.begin();
            assert!(Captures::on(1_000_002).hold_off().is_none());
            panic!("on purpose");
        });
        assert!(panicked.join().is_err());
        assert!(captures.hold_off().is_some());
        drop(captures.begin());
        let _capturing = captures.begin();
        std::thread::spawn(|| drop(Captures::on(1_000_002).begin())).join().unwrap();
    }
}
