//! The product: activations are prepared, then tiles are computed by the pool.

use super::activations::{Kind, RowCopy, Tiling};
use super::packed::PackedMatrix;
use super::simd::LANES;
use super::tile::{Shape, TileArgs, shape, tile_fn};
use crate::cpu::{Isa, ThreadPool};

/// Activations of one task, in bytes: they stay in a core's second-level cache beside a panel.
const BLOCK_BYTES: usize = 384 << 10;
/// Tasks for each thread that suffice for an even load.
const TASKS_PER_THREAD: usize = 16;
/// Most tiles of panels in a task. Neighbours are contiguous in memory, so that one is fetched while the one before
/// it is computed.
const UNITS_PER_TASK: usize = 8;
/// How far ahead weights are fetched where a tile of panels is too large to fetch the next one whole.
const AHEAD: usize = 4 << 10;
/// Tiles of panels up to this size are fetched while the one before them is computed.
const NEXT_UNIT: usize = 64 << 10;
/// Preparing fewer elements than this takes less time than a parallel region.
const PREPARE_ALONE: usize = 8 << 10;
/// Tiles of a parallel task of preparing.
const PREPARE_TILES: usize = 2;

/// The share of the tasks that the feature `slow-gemm` has computed twice, percent.
#[cfg(feature = "slow-gemm")]
const REPEATED_PERCENT: usize = 25;

/// Memory that products reuse from call to call. It grows to the largest product seen, and then stays.
#[derive(Debug, Default)]
pub struct MatmulScratch {
    words: Vec<u32>,
    scales: Vec<f32>,
    sums: Vec<u32>,
    prepared: Vec<Prepared>,
    parts: Vec<Part>,
}

impl MatmulScratch {
    /// Empty.
    pub fn new() -> Self {
        Self::default()
    }
}

/// Activations in one form, and where they lie in the scratch.
#[derive(Debug, Clone, Copy)]
struct Prepared {
    kind: Kind,
    tiling: Tiling,
    words_at: usize,
    groups_at: usize,
    row_words: usize,
    row_groups: usize,
}

/// One matrix of the stack.
#[derive(Debug, Clone, Copy)]
struct Part {
    prepared: usize,
    panels_per_tile: usize,
    /// Its first column in the output.
    col: usize,
    first_task: usize,
    /// Tiles of panels of a task.
    units_per_task: usize,
    /// Tasks that together go through all panels.
    unit_tasks: usize,
    /// Row tiles of a task.
    tiles_per_task: usize,
}

/// `out = x * weights^T + bias`: `x` is `[rows, cols]`, `out` is `[rows, n]` with `n` the sum of the weights' rows,
/// which are stacked in order. Allocates nothing once `scratch` has grown.
///
/// A row's result does not depend on `rows` or on the number of threads.
///
/// # Panics
/// When the machine lacks `isa`, or the lengths do not fit together.
#[allow(clippy::too_many_arguments)] // A product's operands, and where to compute it.
pub fn matmul(
    pool: &ThreadPool,
    isa: Isa,
    x: &[f32],
    rows: usize,
    weights: &[PackedMatrix],
    bias: Option<&[f32]>,
    out: &mut [f32],
    scratch: &mut MatmulScratch,
) {
    assert!(isa.is_available(), "this machine does not support {}", isa.name());
    let Some(cols) = weights.first().map(PackedMatrix::cols) else { return };
    let n: usize = weights.iter().map(PackedMatrix::rows).sum();
    assert!(weights.iter().all(|w| w.cols() == cols), "stacked matrices differ in columns");
    assert_eq!(x.len(), rows * cols, "x is [rows, cols]");
    assert_eq!(out.len(), rows * n, "out is [rows, n]");
    assert!(bias.is_none_or(|bias| bias.len() == n), "a bias for each output");
    if rows == 0 {
        return;
    }
    let tasks = plan(pool, isa, rows, weights, scratch);
    prepare(pool, isa, x, cols, scratch);
    let out = SharedOut(out.as_mut_ptr());
    let scratch = &*scratch;
    let run_one = |task: usize| {
        let index = scratch.parts.partition_point(|part| part.first_task <= task) - 1;
        let part = &scratch.parts[index];
        // SAFETY: the machine has `isa`; the sizes were checked above; each task writes tiles of its own.
        unsafe { run_task(isa, &weights[index], part, task - part.first_task, scratch, bias, &out, n) };
    };
    pool.run(tasks, run_one);
    // The same numbers once more, into the same places.
    #[cfg(feature = "slow-gemm")]
    pool.run((tasks * REPEATED_PERCENT).div_ceil(100), run_one);
}

/// The output, shared by tasks that write disjoint tiles of it.
struct SharedOut(*mut f32);

// SAFETY: see `SharedOut`; the pointer is used only while the output is borrowed.
unsafe impl Sync for SharedOut {}

/// Decides tiles and tasks, and makes room in the scratch. Gives the number of tasks.
fn plan(
    pool: &ThreadPool,
    isa: Isa,
    rows: usize,
    weights: &[PackedMatrix],
    scratch: &mut MatmulScratch,
) -> usize {
    let MatmulScratch { words, scales, sums, prepared, parts } = scratch;
    prepared.clear();
    parts.clear();
    let (mut word_count, mut group_count, mut col, mut tasks) = (0, 0, 0, 0);
    for weight in weights {
        let Shape { rows: most, panels, .. } = shape(isa, weight.scheme());
        let kind = Kind::of(weight.scheme(), shape(isa, weight.scheme()));
        let tiling = Tiling::new(rows, most);
        let known = prepared.iter().position(|p| p.kind == kind && p.tiling == tiling);
        let index = known.unwrap_or_else(|| {
            let (row_words, row_groups) = (kind.row_words(weight.cols()), kind.groups(weight.cols()));
            let (words_at, groups_at) = (word_count, group_count);
            prepared.push(Prepared { kind, tiling, words_at, groups_at, row_words, row_groups });
            word_count += rows * row_words;
            group_count += rows * row_groups;
            prepared.len() - 1
        });
        let units = weight.panels().div_ceil(panels);
        let row_bytes = 4 * prepared[index].row_words;
        let tiles_per_task = tiles_per_task(tiling.tiles(), most * row_bytes, units, pool.threads());
        let blocks = tiling.tiles().div_ceil(tiles_per_task);
        let spare = units * blocks / (pool.threads() * TASKS_PER_THREAD);
        let units_per_task = spare.clamp(1, UNITS_PER_TASK);
        let unit_tasks = units.div_ceil(units_per_task);
        parts.push(Part {
            prepared: index,
            panels_per_tile: panels,
            col,
            first_task: tasks,
            units_per_task,
            unit_tasks,
            tiles_per_task,
        });
        col += weight.rows();
        tasks += unit_tasks * blocks;
    }
    grow(words, word_count);
    grow(scales, group_count);
    grow(sums, group_count);
    tasks
}

/// Row tiles of a task: as many as fit the cache, and fewer where there would be too few tasks to share out.
fn tiles_per_task(tiles: usize, tile_bytes: usize, units: usize, threads: usize) -> usize {
    let fitting = (BLOCK_BYTES / tile_bytes).max(1);
    let wanted_blocks = (threads * TASKS_PER_THREAD).div_ceil(units);
    // A block of fewer than four tiles would read the weights too often.
    let sharing = if threads == 1 { tiles } else { tiles.div_ceil(wanted_blocks).max(4) };
    // Blocks of even size.
    let blocks = tiles.div_ceil(fitting.min(sharing).min(tiles));
    tiles.div_ceil(blocks)
}

fn grow<T: Copy + Default>(vec: &mut Vec<T>, len: usize) {
    if vec.len() < len {
        vec.resize(len, T::default());
    }
}

/// Where in the scratch tasks write the activations; disjoint tiles.
struct SharedScratch {
    words: *mut u32,
    scales: *mut f32,
    sums: *mut u32,
}

// SAFETY: see `SharedScratch`; the pointers are used only while the scratch is borrowed.
unsafe impl Sync for SharedScratch {}

/// Copies `x` into every form that the plan needs.
fn prepare(pool: &ThreadPool, isa: Isa, x: &[f32], cols: usize, scratch: &mut MatmulScratch) {
    let shared = SharedScratch {
        words: scratch.words.as_mut_ptr(),
        scales: scratch.scales.as_mut_ptr(),
        sums: scratch.sums.as_mut_ptr(),
    };
    for form in &scratch.prepared {
        let tiles = form.tiling.tiles();
        let copy = |tile: usize| {
            let shared = &shared;
            let (start, size) = form.tiling.tile(tile);
            for r in 0..size {
                // A pair's two words are neighbours, so that a row starts two words after the row before it.
                let word = if form.kind == Kind::F32Pairs { 2 * r } else { r };
                // SAFETY: `plan` made room for the words and groups of all rows; tile `tile` has those of its rows.
                unsafe {
                    let copy = RowCopy {
                        kind: form.kind,
                        row: &x[(start + r) * cols..][..cols],
                        stride: size,
                        words: shared.words.add(form.words_at + start * form.row_words + word),
                        scales: shared.scales.add(form.groups_at + start * form.row_groups + r),
                        sums: shared.sums.add(form.groups_at + start * form.row_groups + r),
                    };
                    copy.run_on(isa);
                }
            }
        };
        if x.len() < PREPARE_ALONE {
            (0..tiles).for_each(copy);
        } else {
            pool.run(tiles.div_ceil(PREPARE_TILES), |task| {
                (task * PREPARE_TILES..tiles.min((task + 1) * PREPARE_TILES)).for_each(copy);
            });
        }
    }
}

/// Computes one task of a part: a block of row tiles by one tile of panels.
///
/// # Safety
/// The machine has `isa`; `out` is valid for the rows of the plan times `n`, and nobody else writes this task's tile.
#[allow(clippy::too_many_arguments)] // What `matmul` was called with.
unsafe fn run_task(
    isa: Isa,
    weight: &PackedMatrix,
    part: &Part,
    task: usize,
    scratch: &MatmulScratch,
    bias: Option<&[f32]>,
    out: &SharedOut,
    n: usize,
) {
    let form = &scratch.prepared[part.prepared];
    // Tasks that follow each other share activations and go through the weights.
    let (block, units) = (task / part.unit_tasks, task % part.unit_tasks * part.units_per_task);
    let panels = part.panels_per_tile;
    let unit_bytes = panels * weight.panel(0).len();
    let ahead = if unit_bytes <= NEXT_UNIT { unit_bytes } else { AHEAD };
    let lanes = |panel: usize| (weight.rows() - panel * LANES).min(LANES);
    let tiles = form.tiling.tiles();
    let first_tile = block * part.tiles_per_task;
    for unit in units..(units + part.units_per_task).min(weight.panels().div_ceil(panels)) {
        let first_panel = unit * panels;
        let has_second = panels == 2 && first_panel + 1 < weight.panels();
        let second_panel = first_panel + usize::from(has_second);
        let col = part.col + first_panel * LANES;
        for tile in first_tile..tiles.min(first_tile + part.tiles_per_task) {
            let (start, size) = form.tiling.tile(tile);
            // SAFETY: the output has `n` columns in each row; the function is for `size` rows, and `isa` is there.
            unsafe {
                let args = TileArgs {
                    panels: [weight.panel(first_panel).as_ptr(), weight.panel(second_panel).as_ptr()],
                    weights_at: weight.weights_at(),
                    ahead: if tile == first_tile { ahead } else { 0 },
                    cols: weight.cols(),
                    acts: scratch.words[form.words_at + start * form.row_words..].as_ptr().cast(),
                    scales: scratch.scales[form.groups_at + start * form.row_groups..].as_ptr(),
                    sums: scratch.sums[form.groups_at + start * form.row_groups..].as_ptr(),
                    out: out.0.add(start * n + col),
                    out_stride: n,
                    lanes: [lanes(first_panel), if has_second { lanes(second_panel) } else { 0 }],
                    bias: bias.map_or(std::ptr::null(), |bias| bias[col..].as_ptr()),
                };
                tile_fn(isa, weight.scheme(), size)(&args);
            }
        }
    }
}
