//! Attention against float64, and bit for bit against itself in every layout and cut.

mod case;

use case::{Case, Layout, backend, relative_error};
use proptest::prelude::*;
use quire_kernels::cpu::Isa;
use quire_kernels::{HeadShape, KvDtype};

fn shape(heads: usize, kv_heads: usize, head_dim: usize) -> HeadShape {
    HeadShape { heads, kv_heads, head_dim }
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

/// Relative error allowed: queries are rounded to bf16 where the machine multiplies bf16.
fn tolerance(dtype: KvDtype, isa: Isa) -> f64 {
    if dtype == KvDtype::Bf16 && isa == Isa::Avx512 { 4e-3 } else { 2e-6 }
}

#[test]
fn every_shape_is_close_to_float64() {
    let shapes = [
        shape(9, 3, 64),
        shape(4, 4, 80),
        shape(6, 2, 96),
        shape(8, 2, 128),
        shape(2, 1, 256),
        shape(3, 1, 8),
        shape(5, 5, 24),
        shape(16, 1, 72),
    ];
    for isa in Isa::available() {
        let backend = backend(isa, 2);
        for dtype in [KvDtype::F32, KvDtype::Bf16] {
            for (i, heads) in shapes.into_iter().enumerate() {
                let case = Case::new(heads, dtype, &[1, 300, 33, 16, 530], i as u64);
                let ranges = [Some((0, 1)), Some((299, 300)), Some((0, 33)), None, Some((500, 530))];
                let expected = case.expected(&ranges);
                for layout in [Layout::Contiguous, Layout::Paged(16), Layout::Paged(5)] {
                    let slots = case.slots(layout);
                    let cache = case.fill(&backend, &slots);
                    let out = case.attend(&backend, &cache, &slots, &ranges, 3);
                    let error = relative_error(&out, &expected);
                    assert!(
                        error < tolerance(dtype, isa),
                        "{isa:?} {dtype:?} {heads:?} {layout:?}: relative error {error:.1e}"
                    );
                }
            }
        }
    }
}

#[test]
fn every_window_is_close_to_float64() {
    for isa in Isa::available() {
        let backend = backend(isa, 2);
        for window in [1, 2, 17, 255, 256, 257, 500, 5000] {
            for (heads, dtype) in [(shape(9, 3, 64), KvDtype::Bf16), (shape(2, 1, 40), KvDtype::F32)] {
                let case = Case::new(heads, dtype, &[1, 300, 33, 530, 1200], 9).with_window(window);
                let ranges =
                    [Some((0, 1)), Some((299, 300)), Some((0, 33)), Some((240, 530)), Some((1198, 1200))];
                let expected = case.expected(&ranges);
                for layout in [Layout::Contiguous, Layout::Paged(16)] {
                    let slots = case.slots(layout);
                    let cache = case.fill(&backend, &slots);
                    let out = case.attend(&backend, &cache, &slots, &ranges, 3);
                    let error = relative_error(&out, &expected);
                    assert!(
                        error < 2.0 * tolerance(dtype, isa),
                        "{isa:?} {heads:?} {layout:?}, {window}: relative error {error:.1e}"
                    );
                }
            }
        }
    }
}

/// All of a case's outputs, `[sequence][position]`, computed in chunks of the given lengths.
fn in_chunks(case: &Case, isa: Isa, threads: usize, layout: Layout, chunks: &[usize]) -> Vec<Vec<u32>> {
    let backend = backend(isa, threads);
    let slots = case.slots(layout);
    let cache = case.fill(&backend, &slots);
    let mut done = vec![0; case.contexts.len()];
    let mut out = vec![Vec::new(); case.contexts.len()];
    for step in 0.. {
        let ranges: Vec<_> = case
            .contexts
            .iter()
            .enumerate()
            .map(|(s, &n)| {
                let to = n.min(done[s] + chunks[(step + s) % chunks.len()]);
                (done[s] < to).then_some((done[s], to))
            })
            .collect();
        if ranges.iter().all(Option::is_none) {
            break;
        }
        let values = bits(&case.attend(&backend, &cache, &slots, &ranges, step % 3));
        let mut rest = &values[..];
        for (s, range) in ranges.into_iter().enumerate() {
            let Some((from, to)) = range else { continue };
            let (mine, others) = rest.split_at((to - from) * case.heads.heads * case.heads.head_dim);
            out[s].extend_from_slice(mine);
            (rest, done[s]) = (others, to);
        }
    }
    out
}

/// Results of a row are the same bits for every chunking, layout, block size and number of threads.
fn assert_invariant(case: &Case, isa: Isa) {
    let expected = in_chunks(case, isa, 1, Layout::Contiguous, &[1]);
    let longest = *case.contexts.iter().max().expect("not empty");
    let blocks = [1, 2, 3, 4, 8, 16, 31, 32, 64, 100, 128, 256];
    for (i, block_size) in blocks.into_iter().enumerate() {
        let chunks = [vec![longest], vec![1, 7, 50], vec![16], vec![1], vec![40, 3]][i % 5].clone();
        let out = in_chunks(case, isa, 1 + i % 3, Layout::Paged(block_size), &chunks);
        assert!(out == expected, "{isa:?}: blocks of {block_size}, chunks of {chunks:?}");
    }
    let out = in_chunks(case, isa, 2, Layout::Contiguous, &[longest]);
    assert!(out == expected, "{isa:?}: contiguous, one chunk");
}

#[test]
fn rows_do_not_depend_on_batch_layout_or_threads() {
    for isa in Isa::available() {
        assert_invariant(&Case::new(shape(9, 3, 64), KvDtype::Bf16, &[70, 1, 33], 1), isa);
        assert_invariant(&Case::new(shape(4, 2, 40), KvDtype::F32, &[50, 17], 2), isa);
        assert_invariant(&Case::new(shape(2, 1, 80), KvDtype::Bf16, &[40, 20], 3), isa);
    }
}

#[test]
fn rows_do_not_depend_on_batch_layout_or_threads_across_spans() {
    assert_invariant(&Case::new(shape(3, 1, 16), KvDtype::Bf16, &[600, 257], 4), Isa::detect());
    assert_invariant(&Case::new(shape(2, 2, 8), KvDtype::F32, &[520], 5), Isa::Portable);
    for window in [1, 30, 300] {
        let case = Case::new(shape(3, 1, 16), KvDtype::Bf16, &[600, 257], 4);
        assert_invariant(&case.with_window(window), Isa::detect());
    }
}

/// A long decode is split among threads by spans; a decode of many sequences, and one thread, are not.
#[test]
fn a_split_decode_has_the_bits_of_a_whole_one() {
    for (isa, window) in Isa::available().into_iter().flat_map(|isa| [(isa, None), (isa, Some(1000))]) {
        let case = Case::new(shape(9, 3, 64), KvDtype::Bf16, &[2900, 2, 700], 6).with_window(window);
        let slots = case.slots(Layout::Paged(16));
        let decode = |threads| {
            let backend = backend(isa, threads);
            let cache = case.fill(&backend, &slots);
            let ranges = [Some((2899, 2900)), None, Some((697, 700))];
            bits(&case.attend(&backend, &cache, &slots, &ranges, 0))
        };
        let whole = decode(1);
        assert!(whole == decode(2), "{isa:?}: 2 threads");
        assert!(whole == decode(5), "{isa:?}: 5 threads");
    }
}

/// A later token's NaN must not reach an earlier row of the same batch.
#[test]
fn a_row_is_untouched_by_later_tokens() {
    let mut case = Case::new(shape(6, 2, 64), KvDtype::Bf16, &[48], 7);
    for isa in Isa::available() {
        let before = in_chunks(&case, isa, 1, Layout::Paged(4), &[40]);
        case.poison(0, 40);
        let after = in_chunks(&case, isa, 1, Layout::Paged(4), &[48]);
        let clean = 40 * 6 * 64;
        assert!(before[0][..clean] == after[0][..clean], "{isa:?}");
        assert!(f32::from_bits(after[0][clean]).is_nan());
        case = Case::new(shape(6, 2, 64), KvDtype::Bf16, &[48], 7);
    }
}

#[test]
fn extreme_scores_stay_finite() {
    for isa in Isa::available() {
        let mut case = Case::new(shape(2, 1, 64), KvDtype::F32, &[300], 8);
        case.scale = 400.0;
        let backend = backend(isa, 1);
        let slots = case.slots(Layout::Contiguous);
        let cache = case.fill(&backend, &slots);
        let out = case.attend(&backend, &cache, &slots, &[Some((0, 300))], 0);
        assert!(relative_error(&out, &case.expected(&[Some((0, 300))])) < 1e-2, "{isa:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]
    #[test]
    fn ragged_batches_are_close_to_float64(
        kv_heads in 1usize..4,
        group in 1usize..5,
        eighths in 1usize..18,
        contexts in prop::collection::vec((1usize..400, 0usize..60), 1..7),
        block_size in prop::option::of(1u32..=256),
        window in prop::option::of(1u32..500),
        bf16 in any::<bool>(),
        seed in any::<u64>(),
    ) {
        let heads = shape(kv_heads * group, kv_heads, 8 * eighths);
        let dtype = if bf16 { KvDtype::Bf16 } else { KvDtype::F32 };
        let lengths: Vec<usize> = contexts.iter().map(|c| c.0).collect();
        let case = Case::new(heads, dtype, &lengths, seed).with_window(window);
        let ranges: Vec<_> = contexts.iter().map(|&(n, q)| (q > 0).then_some((n - q.min(n), n))).collect();
        prop_assume!(ranges.iter().any(Option::is_some));
        let expected = case.expected(&ranges);
        let layout = block_size.map_or(Layout::Contiguous, Layout::Paged);
        for isa in Isa::available() {
            let backend = backend(isa, 2);
            let slots = case.slots(layout);
            let cache = case.fill(&backend, &slots);
            let error = relative_error(&case.attend(&backend, &cache, &slots, &ranges, 1), &expected);
            prop_assert!(error < 2.0 * tolerance(dtype, isa), "{isa:?} {dtype:?}: relative error {error:.1e}");
        }
    }
}

mod breaches {
    use super::*;
    use quire_kernels::{AttentionBatch, Backend, KvIndex, KvShape};

    /// Attention of one row at position 9 with a cache of 16 slots.
    fn attend(kv: KvIndex<'_>, query_start: &[u32], context_len: &[u32]) {
        let backend = backend(Isa::detect(), 1);
        let shape = KvShape { layers: 1, slots: 16, kv_heads: 1, head_dim: 8, dtype: KvDtype::Bf16 };
        let cache = backend.kv_cache(shape).expect("small");
        let qkv = backend.buffer(1, 24).expect("small");
        let mut out = backend.buffer(1, 8).expect("small");
        let batch =
            AttentionBatch { positions: &[9], slots: &[9], query_start, context_len, kv, window: None };
        backend.attention(&qkv, super::shape(1, 1, 8), 1.0, &batch.into(), 0, &cache, &mut out);
    }

    #[test]
    #[should_panic(expected = "not all inside")]
    fn a_block_outside_the_cache() {
        attend(KvIndex::Paged { block_size: 4, tables: &[0, 4, 1], table_start: &[0] }, &[0, 1], &[10]);
    }

    #[test]
    #[should_panic(expected = "not all inside")]
    fn a_table_that_is_too_short() {
        attend(KvIndex::Paged { block_size: 4, tables: &[0, 1], table_start: &[0] }, &[0, 1], &[10]);
    }

    #[test]
    #[should_panic(expected = "not all inside")]
    fn a_region_outside_the_cache() {
        attend(KvIndex::Contiguous { start: &[7] }, &[0, 1], &[10]);
    }

    #[test]
    #[should_panic(expected = "has rows")]
    fn rows_outside_the_buffer() {
        attend(KvIndex::Contiguous { start: &[0] }, &[0, 2], &[10]);
    }

    #[test]
    #[should_panic(expected = "context of")]
    fn more_rows_than_context() {
        attend(KvIndex::Contiguous { start: &[0] }, &[0, 1], &[0]);
    }
}
