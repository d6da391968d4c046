//! A persistent thread pool for parallel regions of a few microseconds.
//!
//! A region is a number of tasks and a function of the task's index. The calling thread takes part; workers that are
//! awake join, and tasks are claimed from one atomic counter. Nobody waits for a worker that has not joined: when all
//! tasks are claimed, the caller closes the region and waits only for workers still inside a task. An idle worker
//! spins for [`SPIN`] (a forward pass opens a region every few microseconds), then sleeps until the next region.
//!
//! All communication is through one word, `state`: the region's number, whether it is open, and how many workers are
//! inside. A worker joins by a compare-and-swap on a word that it has seen open, so it can never join a region that
//! has been closed, nor read the job of one that has not been published.

use std::any::Any;
use std::cell::{Cell, UnsafeCell};
use std::num::NonZeroUsize;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long an idle worker spins before it sleeps: longer than the serial work between the regions of a forward
/// pass, shorter than anyone would notice on a power meter.
const SPIN: Duration = Duration::from_micros(100);
/// Spins between two looks at the clock.
const SPINS_PER_LOOK: u32 = 64;
/// Spins of the closing caller before it starts yielding its time slice to the workers it waits for.
const CLOSE_SPINS: u32 = 20_000;

/// Layout of the state word: workers inside in the low bits, then the open bit, then the region's number.
const INSIDE: u64 = (1 << 16) - 1;
const OPEN: u64 = 1 << 16;
const REGION: u64 = 1 << 17;

thread_local! {
    /// Whether this thread is running a task of some pool: a region opened from there runs inline.
    static IN_TASK: Cell<bool> = const { Cell::new(false) };
}

type Panic = Box<dyn Any + Send>;

/// The function of the open region, its type and lifetime erased.
#[derive(Clone, Copy)]
struct Job {
    data: *const (),
    call: unsafe fn(*const (), usize, usize),
    tasks: usize,
}

/// A value on cache lines of its own (two: the adjacent-line prefetcher works in pairs).
#[repr(align(128))]
struct Padded<T>(T);

struct Shared {
    state: Padded<AtomicU64>,
    next_task: Padded<AtomicUsize>,
    job: UnsafeCell<Job>,
    sleepers: AtomicUsize,
    stop: AtomicBool,
    sleep: Mutex<()>,
    wake: Condvar,
    panic: Mutex<Option<Panic>>,
}

// SAFETY: `job` is the only field that is not Sync by itself. It is written only by the submitter (one at a time,
// under `ThreadPool::submit`) while the region is closed and nobody is inside, and read only by workers that joined
// after the open bit was published with release ordering. The function it points at is Sync.
unsafe impl Sync for Shared {}
// SAFETY: as above; the raw pointer is only followed while its region is open.
unsafe impl Send for Shared {}

/// A fixed number of threads, the caller's among them, that run parallel regions one at a time.
///
/// A second thread that submits waits for the first one's region to end. A region opened inside a task runs on that
/// task's thread alone.
pub struct ThreadPool {
    shared: Arc<Shared>,
    submit: Mutex<()>,
    workers: Vec<JoinHandle<()>>,
}

impl std::fmt::Debug for ThreadPool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ThreadPool").field("threads", &self.threads()).finish()
    }
}

impl ThreadPool {
    /// A pool of `threads` threads: the caller's and `threads - 1` workers. Where the system refuses to start a
    /// worker, the pool makes do with those it has.
    pub fn new(threads: NonZeroUsize) -> Self {
        fn no_job(_: *const (), _: usize, _: usize) {}
        let shared = Arc::new(Shared {
            state: Padded(AtomicU64::new(0)),
            next_task: Padded(AtomicUsize::new(0)),
            job: UnsafeCell::new(Job { data: std::ptr::null(), call: no_job, tasks: 0 }),
            sleepers: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
            sleep: Mutex::new(()),
            wake: Condvar::new(),
            panic: Mutex::new(None),
        });
        let start = |index: usize| {
            let shared = Arc::clone(&shared);
            let name = format!("quire-worker-{index}");
            std::thread::Builder::new().name(name).spawn(move || shared.work(index)).ok()
        };
        let workers = (1..threads.get().min(INSIDE as usize)).map_while(start).collect();
        Self { shared, submit: Mutex::new(()), workers }
    }

    /// Threads that take part in a region, the caller's included.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// The number of threads that suits this machine: what the process may use, and no more than one a physical
    /// core where the system tells (the kernels saturate a core's vector units or the memory with one thread).
    pub fn default_threads() -> NonZeroUsize {
        let usable = std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN);
        physical_cores().map_or(usable, |cores| usable.min(cores))
    }

    /// Runs `task(0)` to `task(tasks - 1)`, each once, on the pool's threads, and returns when all are done.
    ///
    /// # Panics
    /// With the panic of the first task that panicked; tasks not begun by then are skipped.
    pub fn run(&self, tasks: usize, task: impl Fn(usize) + Sync) {
        self.run_with_thread(tasks, |_, index| task(index));
    }

    /// [`run`](Self::run), where the function gets the thread's index too: `task(thread, index)` with
    /// `thread < self.threads()`. Tasks of the same thread index never run at the same time.
    pub fn run_with_thread<F: Fn(usize, usize) + Sync>(&self, tasks: usize, task: F) {
        if tasks <= 1 || self.workers.is_empty() || IN_TASK.get() {
            // A region opened inside a task keeps thread index 0 to itself: it runs on this thread alone.
            (0..tasks).for_each(|index| task(0, index));
            return;
        }
        unsafe fn call<F: Fn(usize, usize)>(data: *const (), thread: usize, index: usize) {
            // SAFETY: `data` is the `&F` of the region that is open; see `Shared`.
            unsafe { (*data.cast::<F>())(thread, index) }
        }
        let _one_at_a_time = lock(&self.submit);
        let job = Job { data: (&raw const task).cast(), call: call::<F>, tasks };
        self.shared.open(job);
        self.shared.take_part(&job, 0);
        // `take_part` catches panics, so this is reached, and `task` outlives every use of its address.
        self.shared.close();
        if let Some(panic) = lock(&self.shared.panic).take() {
            drop(_one_at_a_time);
            resume_unwind(panic);
        }
    }
}

impl Drop for ThreadPool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.shared.wake_sleepers();
        for worker in self.workers.drain(..) {
            // A worker catches the panics of tasks and has none of its own; nothing to report on the way out.
            let _ = worker.join();
        }
    }
}

impl Shared {
    /// Publishes `job`. The region is closed and nobody is inside.
    fn open(&self, job: Job) {
        // SAFETY: only the submitter writes, between regions; see the Sync implementation.
        unsafe { *self.job.get() = job };
        self.next_task.0.store(0, Ordering::Relaxed);
        let closed = self.state.0.load(Ordering::Relaxed);
        self.state.0.store(closed.wrapping_add(REGION) | OPEN, Ordering::SeqCst);
        self.wake_sleepers();
    }

    /// Lets nobody else in, and waits for those inside.
    fn close(&self) {
        let mut state = self.state.0.fetch_and(!OPEN, Ordering::AcqRel);
        let mut spins = 0;
        while state & INSIDE != 0 {
            if spins < CLOSE_SPINS {
                spins += 1;
                std::hint::spin_loop();
            } else {
                std::thread::yield_now();
            }
            state = self.state.0.load(Ordering::Acquire);
        }
    }

    /// Claims and runs tasks until none is left.
    fn take_part(&self, job: &Job, thread: usize) {
        let was_in_task = IN_TASK.replace(true);
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            loop {
                let index = self.next_task.0.fetch_add(1, Ordering::Relaxed);
                if index >= job.tasks {
                    break;
                }
                // SAFETY: this thread is inside the open region, whose function outlives it.
                unsafe { (job.call)(job.data, thread, index) };
            }
        }));
        IN_TASK.set(was_in_task);
        if let Err(panic) = outcome {
            // Far from both ends: later claims fail and do not wrap around.
            self.next_task.0.store(usize::MAX / 2, Ordering::Relaxed);
            lock(&self.panic).get_or_insert(panic);
        }
    }

    /// A worker's life.
    fn work(&self, thread: usize) {
        let mut seen = 0;
        while let Some(state) = self.wait_for_region(seen) {
            let joined =
                self.state.0.compare_exchange(state, state + 1, Ordering::AcqRel, Ordering::Relaxed).is_ok();
            if joined {
                seen = state / REGION;
                // SAFETY: the compare-and-swap joined an open region, and acquired what was published with it.
                let job = unsafe { *self.job.get() };
                self.take_part(&job, thread);
                self.state.0.fetch_sub(1, Ordering::Release);
            }
        }
    }

    /// Waits for an open region other than `seen`; `None` when the pool ends.
    fn wait_for_region(&self, seen: u64) -> Option<u64> {
        let is_new = |state: u64| state & OPEN != 0 && state / REGION != seen;
        let mut since = None;
        loop {
            for _ in 0..SPINS_PER_LOOK {
                let state = self.state.0.load(Ordering::Relaxed);
                if is_new(state) {
                    return Some(state);
                }
                std::hint::spin_loop();
            }
            if self.stop.load(Ordering::Relaxed) {
                return None;
            }
            if since.get_or_insert_with(Instant::now).elapsed() > SPIN {
                self.sleep_until(|| {
                    self.stop.load(Ordering::SeqCst) || is_new(self.state.0.load(Ordering::SeqCst))
                });
                since = None;
            }
        }
    }

    /// Sleeps until `ready`. The sleeper counts itself before it looks, and the submitter publishes before it looks
    /// at the count, so one of the two sees the other.
    fn sleep_until(&self, ready: impl Fn() -> bool) {
        let mut guard = lock(&self.sleep);
        self.sleepers.fetch_add(1, Ordering::SeqCst);
        while !ready() {
            guard = self.wake.wait(guard).unwrap_or_else(PoisonError::into_inner);
        }
        self.sleepers.fetch_sub(1, Ordering::SeqCst);
    }

    fn wake_sleepers(&self) {
        if self.sleepers.load(Ordering::SeqCst) > 0 {
            let _guard = lock(&self.sleep);
            self.wake.notify_all();
        }
    }
}

/// Locks; no invariant of these mutexes can be broken by a panic, so poison is ignored.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Physical cores, counted by their sets of sibling threads; `None` where the system does not tell.
fn physical_cores() -> Option<NonZeroUsize> {
    let mut siblings = std::collections::HashSet::new();
    for entry in std::fs::read_dir("/sys/devices/system/cpu").ok()? {
        let list = entry.ok()?.path().join("topology/thread_siblings_list");
        if let Ok(list) = std::fs::read_to_string(list) {
            siblings.insert(list);
        }
    }
    NonZeroUsize::new(siblings.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool(threads: usize) -> ThreadPool {
        ThreadPool::new(NonZeroUsize::new(threads).expect("threads"))
    }

    #[test]
    fn every_task_runs_once_over_many_regions() {
        for threads in [1, 2, 4] {
            let pool = pool(threads);
            for round in 0..2_000 {
                let tasks = round % 9;
                let counts: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                pool.run_with_thread(tasks, |thread, index| {
                    assert!(thread < threads);
                    counts[index].fetch_add(1, Ordering::Relaxed);
                });
                assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 1));
            }
        }
    }

    #[test]
    fn a_sleeping_pool_wakes() {
        let pool = pool(3);
        for _ in 0..20 {
            std::thread::sleep(SPIN * 5);
            let sum = AtomicUsize::new(0);
            pool.run(100, |index| {
                sum.fetch_add(index, Ordering::Relaxed);
            });
            assert_eq!(sum.into_inner(), 4950);
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
        let pool = pool(2);
        for bad in [0, 7, 63] {
            let outcome = catch_unwind(AssertUnwindSafe(|| {
                pool.run(64, |index| assert!(index != bad, "task {bad} fails"));
            }));
            let panic = outcome.expect_err("the panic is passed on");
            let message = panic.downcast_ref::<String>().expect("a formatted message");
            assert_eq!(*message, format!("task {bad} fails"));
            let done = AtomicUsize::new(0);
            pool.run(8, |_| {
                done.fetch_add(1, Ordering::Relaxed);
            });
            assert_eq!(done.into_inner(), 8);
        }
    }

    #[test]
    fn nested_and_concurrent_regions_complete() {
        let pool = pool(2);
        let done = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        pool.run(4, |_| {
                            pool.run(3, |_| {
                                done.fetch_add(1, Ordering::Relaxed);
                            });
                        });
                    }
                });
            }
        });
        assert_eq!(done.into_inner(), 3 * 200 * 4 * 3);
    }
}
