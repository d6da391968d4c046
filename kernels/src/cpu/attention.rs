//! Attention over the KV cache: paged and contiguous, prefill and decode, through one kernel.
//!
//! A task computes some rows of a sequence for some KV heads, so that the query heads of a group, and the rows of a
//! prefill, share the loads of keys and values. The softmax is taken span by span ([`span::SPAN`] positions from
//! position 0 on), and the spans are merged in order: a long decode is split among threads by spans and still
//! computed in the order of a prefill. Keys and values are read where they lie; nothing is gathered.

mod addressing;
mod element;
mod plan;
mod scores;
mod span;
mod task;
mod values;

use half::bf16;

use super::disjoint::Disjoint;
use super::lanes::dispatch;
use super::{Isa, ThreadPool};
use crate::{AttentionBatch, HeadShape, KvIndex};
use addressing::{Addressing, Contiguous, Paged};
pub(crate) use element::KvElement;
use plan::Plan;
use task::{Job, MergeSpans, RunItem, Scratch};

/// The keys or the values of one layer, `[slot][kv_head][head_dim]`.
#[derive(Debug, Clone, Copy)]
pub(crate) enum KvSlice<'a> {
    F32(&'a [f32]),
    Bf16(&'a [bf16]),
}

/// Memory that calls reuse.
#[derive(Debug, Default)]
pub(crate) struct AttentionScratch {
    plan: Plan,
    /// One a thread.
    threads: Vec<Scratch>,
    partials: Vec<f32>,
}

/// What a call reads.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Attention<'a> {
    pub(crate) heads: HeadShape,
    pub(crate) scale: f32,
    /// `[rows, (heads + 2 kv_heads) * head_dim]`, rotated.
    pub(crate) qkv: &'a [f32],
    pub(crate) batch: AttentionBatch<'a>,
    pub(crate) k: KvSlice<'a>,
    pub(crate) v: KvSlice<'a>,
}

/// Causal attention of each row over its sequence's context; see
/// [`Backend::attention`](crate::Backend::attention). `out` is `[rows, heads * head_dim]`.
///
/// # Panics
/// When the batch, the index and the cache do not fit together.
pub(crate) fn attention(
    pool: &ThreadPool,
    isa: Isa,
    call: Attention<'_>,
    scratch: &mut AttentionScratch,
    out: &mut [f32],
) {
    match (call.k, call.v) {
        (KvSlice::F32(k), KvSlice::F32(v)) => with_element(pool, isa, call, k, v, scratch, out),
        (KvSlice::Bf16(k), KvSlice::Bf16(v)) => with_element(pool, isa, call, k, v, scratch, out),
        _ => panic!("keys and values of different types"),
    }
}

fn with_element<E: KvElement>(
    pool: &ThreadPool,
    isa: Isa,
    call: Attention<'_>,
    k: &[E],
    v: &[E],
    scratch: &mut AttentionScratch,
    out: &mut [f32],
) {
    match call.batch.kv {
        KvIndex::Paged { block_size, tables, table_start } => {
            assert!((1..=256).contains(&block_size), "blocks of {block_size} slots");
            let paged = Paged { block_size: block_size as usize, tables, table_start };
            run(pool, isa, call, (k, v, paged), scratch, out);
        }
        KvIndex::Contiguous { start } => {
            run(pool, isa, call, (k, v, Contiguous { start }), scratch, out);
        }
    }
}

fn run<E: KvElement, A: Addressing>(
    pool: &ThreadPool,
    isa: Isa,
    call: Attention<'_>,
    (k, v, addressing): (&[E], &[E], A),
    scratch: &mut AttentionScratch,
    out: &mut [f32],
) {
    let HeadShape { heads, kv_heads, head_dim } = call.heads;
    let rows = check(&call, k.len(), v.len(), addressing, out.len());
    out[rows * heads * head_dim..].fill(0.0);
    scratch.plan.make(call.heads, &call.batch, pool.threads());
    scratch.threads.resize_with(pool.threads().max(scratch.threads.len()), Scratch::default);
    let partials = scratch.plan.partial_queries() * task::partial_len(head_dim);
    if scratch.partials.len() < partials {
        scratch.partials.resize(partials, 0.0);
    }

    let plan = &scratch.plan;
    let job = Job {
        heads: call.heads,
        scale: call.scale * std::f32::consts::LOG2_E,
        qkv: call.qkv,
        k,
        v,
        addressing,
        out: Disjoint::new(out),
        partials: Disjoint::new(&mut scratch.partials),
    };
    let memory = Disjoint::new(&mut scratch.threads);
    let item = |thread: usize, task: usize| {
        // SAFETY: a thread runs one task at a time.
        let scratch = unsafe { &mut memory.part(thread, 1)[0] };
        dispatch(isa, RunItem { job: &job, item: plan.items()[task], scratch });
    };
    if plan.inline() {
        (0..plan.items().len()).for_each(|task| item(0, task));
    } else {
        pool.run_with_thread(plan.items().len(), item);
    }
    let merges = plan.merges();
    if !merges.is_empty() {
        pool.run(merges.len() * kv_heads, |task| {
            let (merge, head) = (&merges[task / kv_heads], task % kv_heads);
            dispatch(
                isa,
                MergeSpans { job: &job, row: merge.row, head, first: plan.partials_of(merge, head) },
            );
        });
    }
}

/// Checks everything that memory safety rests on, and gives the number of rows that are no padding.
fn check<A: Addressing>(call: &Attention<'_>, k: usize, v: usize, addressing: A, out: usize) -> usize {
    let HeadShape { heads, kv_heads, head_dim } = call.heads;
    let batch = &call.batch;
    assert!(
        kv_heads > 0 && heads > 0 && heads.is_multiple_of(kv_heads),
        "{heads} query heads over {kv_heads} KV heads"
    );
    assert!(head_dim > 0 && head_dim.is_multiple_of(8), "heads of {head_dim} elements");
    let rows = out / (heads * head_dim);
    assert_eq!(out, rows * heads * head_dim, "columns of the output");
    assert_eq!(call.qkv.len(), rows * (heads + 2 * kv_heads) * head_dim, "columns of Q, K and V");
    let slots = k / (kv_heads * head_dim);
    assert_eq!(k, v, "as many values as keys");
    assert_eq!(k, slots * kv_heads * head_dim, "elements of a slot");
    assert_eq!(batch.query_start.len(), batch.context_len.len() + 1, "a row range for every sequence");
    assert!(batch.window != Some(0), "a window in which a row does not see itself");
    assert_eq!(batch.query_start[0], 0, "the first sequence starts at row 0");
    for (s, (range, &context)) in batch.query_start.windows(2).zip(batch.context_len).enumerate() {
        assert!(
            range[0] <= range[1] && range[1] as usize <= rows,
            "sequence {s} has rows {range:?} of {rows}"
        );
        let queries = range[1] - range[0];
        assert!(queries <= context, "sequence {s} has {queries} rows and a context of {context}");
        if queries > 0 {
            let needed = addressing.slots_needed(s, context as usize);
            assert!(
                needed.is_some_and(|needed| needed <= slots),
                "the {context} tokens of sequence {s} are not all inside the index and {slots} slots"
            );
        }
    }
    batch.query_start.last().map_or(0, |&end| end as usize)
}
