//! Rotary position embedding (Su et al. 2021) with the half-split pairing, per-head normalization of Q and K, and the
//! store of K and V, in one pass over the rows.

use super::attention::KvElement;
use super::disjoint::Disjoint;
use super::lanes::{Kernel, Lanes, dispatch};
use super::norm::norm_row;
use super::{AlignedBuffer, Isa, ThreadPool};
use crate::{HeadShape, KernelError, NO_SLOT};

/// Cosines and sines of every position.
#[derive(Debug)]
pub struct RopeTable {
    /// `[position][cos of each frequency, then sin]`.
    angles: AlignedBuffer<f32>,
    half: usize,
    positions: usize,
}

impl RopeTable {
    /// See [`Backend::load_rope`](crate::Backend::load_rope).
    pub(crate) fn new(inv_freq: &[f32], scale: f32, positions: usize) -> Result<Self, KernelError> {
        let half = inv_freq.len();
        if half == 0 || positions == 0 {
            return Err(KernelError::Shape(format!(
                "a rotation table of {half} frequencies and {positions} positions"
            )));
        }
        let len = positions.saturating_mul(2).saturating_mul(half);
        let mut angles = AlignedBuffer::zeroed(len, "the rotation table")?;
        for (position, row) in angles.chunks_exact_mut(2 * half).enumerate() {
            let (cos, sin) = row.split_at_mut(half);
            for ((cos, sin), freq) in cos.iter_mut().zip(sin).zip(inv_freq) {
                // The product is rounded to f32 as the models' own code does; its sine and cosine are not.
                let angle = f64::from(position as f32 * freq);
                *cos = (angle.cos() * f64::from(scale)) as f32;
                *sin = (angle.sin() * f64::from(scale)) as f32;
            }
        }
        Ok(Self { angles, half, positions })
    }

    fn at(&self, position: usize) -> (&[f32], &[f32]) {
        assert!(position < self.positions, "position {position} of a table of {}", self.positions);
        self.angles[position * 2 * self.half..][..2 * self.half].split_at(self.half)
    }
}

/// What to do to each row, and where its K and V go.
pub(crate) struct RotateAndStore<'a, E> {
    pub(crate) heads: HeadShape,
    pub(crate) rope: &'a RopeTable,
    /// Weights of Q and K, and epsilon.
    pub(crate) norm: Option<(&'a [f32], &'a [f32], f32)>,
    /// `[rows]`
    pub(crate) positions: &'a [u32],
    /// `[rows]`
    pub(crate) slots: &'a [u32],
    /// `[rows, (heads + 2 kv_heads) * head_dim]`
    pub(crate) qkv: &'a mut [f32],
    /// `[slots][kv_heads][head_dim]`
    pub(crate) k: &'a mut [E],
    pub(crate) v: &'a mut [E],
}

/// Rows below which a region costs more than it saves.
const PARALLEL_ROWS: usize = 16;

/// Normalizes and rotates Q and K in place and stores K and V. Rows with [`NO_SLOT`] are left alone.
pub(crate) fn rotate_and_store<E: KvElement>(pool: &ThreadPool, isa: Isa, work: RotateAndStore<'_, E>) {
    let HeadShape { heads, kv_heads, head_dim } = work.heads;
    let rows = work.slots.len();
    assert_eq!(work.positions.len(), rows, "a position for every row");
    assert_eq!(work.qkv.len(), rows * (heads + 2 * kv_heads) * head_dim, "columns of Q, K and V");
    assert_eq!(work.rope.half * 2, head_dim, "frequencies of the rotation");
    if let Some((q, k, _)) = work.norm {
        assert!(q.len() == head_dim && k.len() == head_dim, "norm weights of one head");
    }
    // Rows that (against the contract) share a slot fall to one task, so that no two threads write one place.
    let tasks = if rows < PARALLEL_ROWS || pool.threads() == 1 { 1 } else { 4 * pool.threads() };
    let tables = Shared {
        heads: work.heads,
        rope: work.rope,
        norm: work.norm,
        positions: work.positions,
        slots: work.slots,
        qkv: Disjoint::new(work.qkv),
        k: Disjoint::new(work.k),
        v: Disjoint::new(work.v),
    };
    let run = |task| dispatch(isa, TaskRows { shared: &tables, task, tasks });
    if tasks == 1 { run(0) } else { pool.run(tasks, run) }
}

struct Shared<'a, E> {
    heads: HeadShape,
    rope: &'a RopeTable,
    norm: Option<(&'a [f32], &'a [f32], f32)>,
    positions: &'a [u32],
    slots: &'a [u32],
    qkv: Disjoint<'a, f32>,
    k: Disjoint<'a, E>,
    v: Disjoint<'a, E>,
}

/// The rows whose slots fall to `task`.
struct TaskRows<'a, E> {
    shared: &'a Shared<'a, E>,
    task: usize,
    tasks: usize,
}

/// The task that stores to `slot`: a multiplicative hash, since slots come in runs and strides.
#[inline(always)]
fn task_of(slot: u32, tasks: usize) -> usize {
    (slot.wrapping_mul(0x9e37_79b1) >> 16) as usize % tasks
}

impl<E: KvElement> Kernel for TaskRows<'_, E> {
    type Output = ();
    #[inline(always)]
    fn run<L: Lanes>(self, l: L) {
        let shared = self.shared;
        let HeadShape { heads, kv_heads, head_dim } = shared.heads;
        let (kv, cols) = (kv_heads * head_dim, (heads + 2 * kv_heads) * head_dim);
        for (i, (&slot, &position)) in shared.slots.iter().zip(shared.positions).enumerate() {
            if slot == NO_SLOT || (self.tasks > 1 && task_of(slot, self.tasks) != self.task) {
                continue;
            }
            // SAFETY: a row, and a slot, belong to one task.
            let (row, k, v) = unsafe {
                let at = slot as usize * kv;
                (shared.qkv.part(i * cols, cols), shared.k.part(at, kv), shared.v.part(at, kv))
            };
            let (cos, sin) = shared.rope.at(position as usize);
            for (h, head) in row[..(heads + kv_heads) * head_dim].chunks_exact_mut(head_dim).enumerate() {
                if let Some((q_weight, k_weight, eps)) = shared.norm {
                    let weight = if h < heads { q_weight } else { k_weight };
                    // SAFETY: the weights are as long as the head.
                    unsafe { norm_row(l, head.as_ptr(), weight, eps, head.as_mut_ptr()) };
                }
                rotate(l, head, cos, sin);
            }
            let (new_k, new_v) = row[heads * head_dim..].split_at(kv);
            store(l, new_k, k);
            store(l, new_v, v);
        }
    }
}

/// Rotates element `i` with `i + half`.
#[inline(always)]
fn rotate<L: Lanes>(l: L, head: &mut [f32], cos: &[f32], sin: &[f32]) {
    let (low, high) = head.split_at_mut(cos.len());
    debug_assert!(low.len() == high.len() && sin.len() == cos.len());
    for i in (0..cos.len()).step_by(L::N) {
        let n = (cos.len() - i).min(L::N);
        // SAFETY: `n` elements from `i` lie inside the four slices.
        unsafe {
            let (c, s) = (l.load_first(cos.as_ptr().add(i), n), l.load_first(sin.as_ptr().add(i), n));
            let a = l.load_first(low.as_ptr().add(i), n);
            let b = l.load_first(high.as_ptr().add(i), n);
            l.store_first(low.as_mut_ptr().add(i), n, l.sub(l.mul(a, c), l.mul(b, s)));
            l.store_first(high.as_mut_ptr().add(i), n, l.fma(b, c, l.mul(a, s)));
        }
    }
}

#[inline(always)]
fn store<L: Lanes, E: KvElement>(l: L, from: &[f32], to: &mut [E]) {
    assert_eq!(from.len(), to.len(), "as many elements as the slot has");
    for i in (0..from.len()).step_by(L::N) {
        let n = (from.len() - i).min(L::N);
        // SAFETY: `n` elements from `i` lie inside both slices.
        unsafe { E::store(l, to.as_mut_ptr().add(i), n, l.load_first(from.as_ptr().add(i), n)) };
    }
}
