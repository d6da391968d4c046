//! The operations besides attention.

use quire_kernels::{
    AttentionBatch, Backend, HeadShape, KvIndex, KvShape, MatrixSource, NO_SLOT, QkTransform, StepInput,
    WeightFormat, quant, reference,
};
use rand::RngExt;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;

use crate::{Device, HEAD_DIMS, on_every_device, random, random_heads, round, seeds, weight_bytes};

const HEADS: HeadShape = HeadShape { heads: 4, kv_heads: 2, head_dim: 64 };
/// Rows and columns: one row, odd columns, the models' widths.
const SIZES: [(usize, usize); 7] =
    [(1, 576), (3, 9), (5, 100), (130, 576), (33, 2050), (2, 4096), (300, 2048)];

/// [`SIZES`], and random ones, every other of columns that a GPU takes eight at a time.
fn sizes(rng: &mut StdRng) -> Vec<(usize, usize)> {
    let drawn: [_; 8] = std::array::from_fn(|i| {
        let cols = if i % 2 == 0 { 8 * rng.random_range(1..=400) } else { rng.random_range(1..=3000) };
        (rng.random_range(1..=150), cols)
    });
    SIZES.into_iter().chain(drawn).collect()
}

/// A step that only says tokens and wanted rows.
pub(crate) fn rows<'a>(tokens: &'a [u32], logit_rows: &'a [u32]) -> StepInput<'a> {
    let kv = KvIndex::Contiguous { start: &[] };
    let batch =
        AttentionBatch { positions: &[], slots: &[], query_start: &[0], context_len: &[], kv, window: None };
    StepInput { tokens, batch, logit_rows }
}

fn norms<B: Backend>(d: &Device<B>, rng: &mut StdRng) {
    for (rows, cols) in sizes(rng) {
        let (x, weight) = (random(rows * cols, rng), random(cols, rng));
        let w = d.backend.load_vector(&weight).expect("small");
        let mut out = d.poisoned(rows, cols);
        d.backend.rms_norm(&d.filled(cols, &x), &w, 1e-5, &mut out);
        let what = format!("norm of {rows} x {cols}");
        d.assert_close(&d.read(&out), &reference::rms_norm(&x, &weight, 1e-5), 1.5, &what);

        let (x, delta) = (random(rows * cols, rng), random(rows * cols, rng));
        let mut residual = d.filled(cols, &x);
        let mut out = d.poisoned(rows, cols);
        d.backend.add_rms_norm(&mut residual, &d.filled(cols, &delta), &w, 1e-6, &mut out);
        let exact: Vec<f64> = x.iter().zip(&delta).map(|(&a, &b)| f64::from(a) + f64::from(b)).collect();
        let sum = d.read(&residual);
        d.assert_close(&sum, &exact, 1.0, &format!("sum, {what}"));
        d.assert_close(&d.read(&out), &reference::rms_norm(&sum, &weight, 1e-6), 1.5, &what);
    }
}

#[test]
fn norms_are_close_to_float64() {
    for mut rng in seeds(&[11]) {
        on_every_device!(HEADS, norms, &mut rng);
    }
}

fn activation<B: Backend>(d: &Device<B>, rng: &mut StdRng) {
    for (rows, cols) in sizes(rng) {
        let mut x = random(rows * 2 * cols, rng);
        x[0] = -120.0;
        x[cols / 2] = 90.0;
        let mut out = d.poisoned(rows, cols);
        d.backend.silu_mul(&d.filled(2 * cols, &x), &mut out);
        let what = format!("activation of {rows} x {cols}");
        d.assert_close(&d.read(&out), &reference::silu_mul(&x, cols), 1.5, &what);
    }
}

#[test]
fn activation_is_close_to_float64() {
    for mut rng in seeds(&[12]) {
        on_every_device!(HEADS, activation, &mut rng);
    }
}

fn embedding<B: Backend>(d: &Device<B>, stored: WeightFormat, rng: &mut StdRng) {
    // Columns, rows of the two parts of a table, and tokens.
    let drawn: [_; 4] = std::array::from_fn(|_| {
        let parts = [rng.random_range(1..=50), rng.random_range(1..=250)];
        (8 * rng.random_range(1..=150), parts, rng.random_range(1..=400))
    });
    let sizes = [64, 576, 2048].map(|cols| (cols, [5, 400], 600));
    for (cols, [first, second], count) in sizes.into_iter().chain(drawn) {
        let table = random((first + second) * cols, rng);
        let bytes = weight_bytes(stored, &table);
        let (head, tail) = bytes.split_at(first * cols * 2);
        let parts = [(first, head), (second, tail)]
            .map(|(rows, bytes)| MatrixSource::new(stored, rows, cols, bytes).expect("sizes agree"));
        let weight = d.backend.load_matrix(&parts).expect("small");
        // Every one of the table, where there are as many.
        let mut order: Vec<u32> = (0..(first + second) as u32).collect();
        order.shuffle(rng);
        let tokens: Vec<u32> = order.into_iter().cycle().take(count).collect();
        let wanted = [count as u32 - 1, 0, rng.random_range(0..count as u32)];
        let step = d.backend.begin_step(rows(&tokens, &wanted)).expect("small");
        let mut out = d.poisoned(tokens.len(), cols);
        d.backend.embed(&step, &weight, &mut out);
        let values = d.read(&out);
        for (token, row) in tokens.iter().map(|&t| t as usize).zip(values.chunks_exact(cols)) {
            assert_eq!(row, &table[token * cols..][..cols], "{}: token {token}", d.name);
        }
        let mut gathered = d.poisoned(wanted.len(), cols);
        d.backend.gather_rows(&out, &step, &mut gathered);
        for (row, from) in d.read(&gathered).chunks_exact(cols).zip(wanted) {
            assert_eq!(row, &values[from as usize * cols..][..cols], "{}: row {from}", d.name);
        }
    }
}

#[test]
fn rows_are_looked_up_and_gathered() {
    for mut rng in seeds(&[13]) {
        for stored in [WeightFormat::Bf16, WeightFormat::F16] {
            on_every_device!(HEADS, embedding, stored, &mut rng);
        }
    }
}

/// A matrix of these values.
fn matrix<B: Backend>(d: &Device<B>, values: &[f32], cols: usize) -> B::Weight {
    let bytes = weight_bytes(d.weights, values);
    let source = MatrixSource::new(d.weights, values.len() / cols, cols, &bytes).expect("sizes agree");
    d.backend.load_matrix(&[source]).expect("small")
}

/// Outputs and columns of products: fewer than a tile has, and not whole tiles, and several for every multiprocessor.
const PRODUCTS: [(usize, usize); 7] =
    [(960, 576), (40, 64), (136, 2048), (6, 8), (131, 1000), (264, 4104), (4230, 520)];

/// [`PRODUCTS`] of these numbers of rows, and random ones: of few rows, which a GPU has a kernel of its own for, and of more.
fn shapes_of_products(rows: &[usize], rng: &mut StdRng) -> Vec<(usize, usize, Vec<usize>)> {
    let listed = PRODUCTS.map(|(outputs, cols)| (outputs, cols, rows.to_vec()));
    let drawn: [_; 6] = std::array::from_fn(|_| {
        let rows = [8, 40, 250].map(|most| rng.random_range(1..=most));
        (rng.random_range(16..=600), 8 * rng.random_range(1..=150), rows.to_vec())
    });
    listed.into_iter().chain(drawn).collect()
}

fn products<B: Backend>(d: &Device<B>, rng: &mut StdRng) {
    let all = [1, 2, 3, 7, 8, 12, 16, 24, 32, 33, 128, 300];
    for (outputs, cols, all) in shapes_of_products(&all, rng) {
        let weights = random(outputs * cols, rng);
        let weight = matrix(d, &weights, cols);
        let bias = random(outputs, rng);
        let bias_vector = d.backend.load_vector(&bias).expect("small");
        for rows in all {
            if rows * outputs * cols > 1 << 26 {
                continue;
            }
            let x = random(rows * cols, rng);
            let mut out = d.poisoned(rows, outputs);
            d.backend.linear(&d.filled(cols, &x), &weight, Some(&bias_vector), &mut out);
            let what = format!("{rows} x {cols} by {outputs}");
            // The CPU's bf16 instruction sums pairs in its own order, and rounds nothing else here.
            d.assert_close(&d.read(&out), &reference::matmul(&x, &weights, cols, Some(&bias)), 2.0, &what);
            let x = random(rows * cols, rng);
            let mut logits = d.backend.logits_buffer(rows, outputs).expect("small");
            d.backend.set_rows(&mut logits, rows);
            d.backend.linear(&d.filled(cols, &x), &weight, None, &mut logits);
            let error = crate::relative_error(&d.read(&logits), &reference::matmul(&x, &weights, cols, None));
            // Tensor cores cut off what their sums do not hold, once for some columns: an error that grows with these.
            let bound = f64::max(4e-6, 1.5e-9 * cols as f64);
            assert!(error < bound, "{}: logits of {what}: {error:.2e}", d.name);
        }
    }
}

#[test]
fn products_are_close_to_float64() {
    for mut rng in seeds(&[14]) {
        on_every_device!(HEADS, products, &mut rng);
    }
}

/// Products and sums beyond what the device holds become its greatest number, so that norms of them are numbers.
fn overflow<B: Backend>(d: &Device<B>) {
    const COLS: usize = 64;
    let weight = matrix(d, &[256.0; COLS * COLS], COLS);
    let norm = d.backend.load_vector(&[1.0; COLS]).expect("small");
    // As many as our own kernel for few rows takes, and more.
    for rows in [1, 40] {
        let of_rows = |size: f32| -> Vec<f32> {
            let row = |row| [if row % 2 == 0 { size } else { -size }; COLS];
            (0..rows).flat_map(row).collect()
        };
        let mut product = d.poisoned(rows, COLS);
        d.backend.linear(&d.filled(COLS, &of_rows(256.0)), &weight, None, &mut product);
        // 59,904 is a number of bfloat16 and float16, and so is, of bfloat16, twice that.
        let addends =
            [(0.0, product, 4_194_304.0), (59_904.0, d.filled(COLS, &of_rows(59_904.0)), 119_808.0)];
        for (start, delta, exact) in addends {
            let mut residual = d.filled(COLS, &of_rows(start));
            let mut out = d.poisoned(rows, COLS);
            d.backend.add_rms_norm(&mut residual, &delta, &norm, 1e-5, &mut out);
            assert_eq!(d.read(&residual), of_rows(d.most.min(exact)), "{}: {rows} rows", d.name);
            let signs: Vec<f64> = of_rows(1.0).into_iter().map(f64::from).collect();
            d.assert_close(&d.read(&out), &signs, 1.0, &format!("norm of {exact}, {rows} rows"));
        }
    }
}

#[test]
fn what_is_too_large_is_held_as_the_greatest_number() {
    on_every_device!(HEADS, overflow);
}

fn gated_products<B: Backend>(d: &Device<B>, rng: &mut StdRng) {
    for (outputs, cols, all) in shapes_of_products(&[1, 2, 5, 8, 16, 32, 33], rng) {
        let outputs = outputs / 2;
        // Gates of some units, as they are in models.
        let scale = 1.0 / (cols as f32).sqrt();
        let weights: Vec<f32> = random(2 * outputs * cols, rng).iter().map(|x| round(x * scale)).collect();
        let weight = matrix(d, &weights, cols);
        for rows in all {
            let x = random(rows * cols, rng);
            let (mut gate_up, mut out) = (d.poisoned(rows, 2 * outputs), d.poisoned(rows, outputs));
            d.backend.linear_silu_mul(&d.filled(cols, &x), &weight, &mut gate_up, &mut out);
            let exact = reference::matmul(&x, &weights, cols, None);
            let exact = exact.chunks_exact(2 * outputs).flat_map(|row| {
                let (gate, up) = row.split_at(outputs);
                gate.iter().zip(up).map(|(gate, up)| gate / (1.0 + (-gate).exp()) * up)
            });
            // A device that does one after the other rounds in between.
            let what = format!("gated {rows} x {cols} by {outputs}");
            d.assert_close(&d.read(&out), &exact.collect::<Vec<f64>>(), 2.5, &what);
        }
    }
}

#[test]
fn gated_products_are_close_to_float64() {
    for mut rng in seeds(&[15]) {
        on_every_device!(HEADS, gated_products, &mut rng);
    }
}

/// A product with rotation and storing: Q as it is left, V as attention over one token gives it, K by the weights that
/// attention over two tokens gives them.
fn projection<B: Backend>(d: &Device<B>, heads: HeadShape, cols: usize, rows: usize, rng: &mut StdRng) {
    let HeadShape { heads: q_heads, kv_heads, head_dim } = heads;
    let units = q_heads + 2 * kv_heads;
    let width = units * head_dim;
    let inv_freq: Vec<f32> =
        (0..head_dim / 2).map(|i| 1e4f32.powf(-2.0 * i as f32 / head_dim as f32)).collect();
    let scale = 1.0 / (cols as f32).sqrt();
    let weights: Vec<f32> = random(width * cols, rng).iter().map(|x| round(x * scale)).collect();
    let (x, bias) = (random(rows * cols, rng), random(width, rng));
    let weight = matrix(d, &weights, cols);
    let bias_vector = d.backend.load_vector(&bias).expect("small");
    let rope = d.backend.load_rope(&inv_freq, 1.0, 500).expect("small");
    let transform = QkTransform { heads, rope: &rope, qk_norm: None };
    // Neighbours have each other's slot; the last of several rows has none.
    let positions: Vec<u32> = (0..rows).map(|_| rng.random_range(0..500)).collect();
    let mut slots: Vec<u32> = (0..rows as u32).map(|i| i ^ 1).collect();
    let spare = rows > 2;
    if spare {
        slots[rows - 1] = NO_SLOT;
    }
    let live = rows - usize::from(spare);
    let start: Vec<u32> = slots[..live].to_vec();
    let query_start: Vec<u32> = (0..=live as u32).collect();
    let context_len = vec![1; live];
    let kv = KvIndex::Contiguous { start: &start };
    let batch = AttentionBatch {
        positions: &positions,
        slots: &slots,
        query_start: &query_start,
        context_len: &context_len,
        kv,
        window: None,
    };
    let shape = KvShape { layers: 2, slots: rows + 1, kv_heads, head_dim, dtype: d.kv };
    let mut cache = d.backend.kv_cache(shape).expect("small");
    let mut qkv = d.poisoned(rows, width);
    let step = d.backend.begin_step(batch.into()).expect("small");
    let input = d.filled(cols, &x);
    let bias = Some((bias_vector, bias)).filter(|_| rows % 2 == 1);
    let bias_vector = bias.as_ref().map(|(vector, _)| vector);
    d.backend.linear_rotate_and_store(
        &input,
        &weight,
        bias_vector,
        &mut qkv,
        &transform,
        &step,
        1,
        &mut cache,
    );
    let mut out = d.poisoned(rows, q_heads * head_dim);
    d.backend.attention(&qkv, heads, 1.0, &step, 1, &cache, &mut out);
    let (got, out) = (d.read(&qkv), d.read(&out));
    let exact = reference::matmul(&x, &weights, cols, bias.as_ref().map(|(_, values)| &values[..]));
    let exact = |row: usize, unit: usize| &exact[row * width + unit * head_dim..][..head_dim];
    for row in 0..live {
        let what = format!("projected row {row} of {rows}, {heads:?}");
        for head in 0..q_heads {
            let expected = reference::rope(exact(row, head), &inv_freq, 1.0, positions[row]);
            let q = &got[row * width + head * head_dim..][..head_dim];
            d.assert_close(q, &expected, 3.0, &what);
            let v = exact(row, q_heads + kv_heads + head / (q_heads / kv_heads));
            let attended = &out[(row * q_heads + head) * head_dim..][..head_dim];
            // Every device stores V, like K, in 16 bits.
            let error = crate::relative_error(attended, v);
            assert!(error < 3.0 * d.stored(), "{}: V, {what}: relative error {error:.2e}", d.name);
        }
    }
    // Rows 0 and 1 lie at slots 1 and 0, taken as a sequence of two tokens.
    if live < 2 {
        return;
    }
    let query: Vec<f32> = (0..width).map(|i| (1 + i % 2) as f32 * 0.125).collect();
    let kv = KvIndex::Contiguous { start: &[0] };
    let batch = AttentionBatch {
        positions: &[1],
        slots: &[NO_SLOT],
        query_start: &[0, 1],
        context_len: &[2],
        kv,
        window: None,
    };
    let step = d.backend.begin_step(batch.into()).expect("small");
    let mut out = d.poisoned(1, q_heads * head_dim);
    d.backend.attention(&d.filled(width, &query), heads, 1.0, &step, 1, &cache, &mut out);
    let out = d.read(&out);
    for head in 0..q_heads {
        let kv_head = head / (q_heads / kv_heads);
        let score = |row: usize| -> f64 {
            let key = reference::rope(exact(row, q_heads + kv_head), &inv_freq, 1.0, positions[row]);
            key.iter().zip(&query[head * head_dim..]).map(|(&k, &q)| k * f64::from(q)).sum()
        };
        let first = 1.0 / (1.0 + (score(1) - score(0)).exp());
        let value = |row: usize| exact(row, q_heads + kv_heads + kv_head);
        let expected: Vec<f64> =
            value(0).iter().zip(value(1)).map(|(a, b)| first * a + (1.0 - first) * b).collect();
        // The scores are sums of many rounded keys.
        let error = crate::relative_error(&out[head * head_dim..][..head_dim], &expected);
        assert!(
            error < 8.0 * d.stored(),
            "{}: projected keys, {heads:?}: relative error {error:.2e}",
            d.name
        );
    }
}

#[test]
fn projections_are_close_to_float64() {
    for mut rng in seeds(&[16]) {
        for (heads, kv_heads, head_dim, cols) in
            [(9, 3, 64, 576), (2, 2, 80, 72), (4, 1, 128, 1000), (6, 2, 96, 64), (2, 1, 256, 136)]
        {
            let heads = HeadShape { heads, kv_heads, head_dim };
            for rows in [1, 2, 7, 16, 31, 60] {
                on_every_device!(heads, projection, heads, cols, rows, &mut rng);
            }
        }
        for head_dim in HEAD_DIMS {
            let heads = random_heads(head_dim, &mut rng);
            for most_rows in [16, 60] {
                let (cols, rows) = (8 * rng.random_range(1..=75), rng.random_range(1..=most_rows));
                on_every_device!(heads, projection, heads, cols, rows, &mut rng);
            }
        }
    }
}

/// Rotation, QK norm and the stored values, read back through attention over one token: its output is V.
fn rotation<B: Backend>(d: &Device<B>, heads: HeadShape, norm: bool, rows: usize, rng: &mut StdRng) {
    let HeadShape { heads: q_heads, kv_heads, head_dim } = heads;
    let cols = (q_heads + 2 * kv_heads) * head_dim;
    let inv_freq: Vec<f32> =
        (0..head_dim / 2).map(|i| 1e4f32.powf(-2.0 * i as f32 / head_dim as f32)).collect();
    let (x, q_weight, k_weight) = (random(rows * cols, rng), random(head_dim, rng), random(head_dim, rng));
    let rope = d.backend.load_rope(&inv_freq, 1.25, 5000).expect("small");
    let vector = |values: &[f32]| d.backend.load_vector(values).expect("small");
    let weights = (vector(&q_weight), vector(&k_weight));
    let transform =
        QkTransform { heads, rope: &rope, qk_norm: norm.then_some((&weights.0, &weights.1, 1e-6)) };
    let positions: Vec<u32> = (0..rows).map(|_| rng.random_range(0..5000)).collect();
    let mut slots: Vec<u32> = (0..rows as u32).collect();
    slots.shuffle(rng);
    slots[rows / 2] = NO_SLOT;
    let start: Vec<u32> = slots.iter().map(|&slot| if slot == NO_SLOT { 0 } else { slot }).collect();
    let query_start: Vec<u32> = (0..=rows as u32).collect();
    let context_len = vec![1; rows];
    let kv = KvIndex::Contiguous { start: &start };
    let batch = AttentionBatch {
        positions: &positions,
        slots: &slots,
        query_start: &query_start,
        context_len: &context_len,
        kv,
        window: None,
    };
    let shape = KvShape { layers: 2, slots: rows, kv_heads, head_dim, dtype: d.kv };
    let mut cache = d.backend.kv_cache(shape).expect("small");
    let mut qkv = d.filled(cols, &x);
    let step = d.backend.begin_step(batch.into()).expect("small");
    d.backend.rotate_and_store(&mut qkv, &transform, &step, 1, &mut cache);
    let mut out = d.poisoned(rows, q_heads * head_dim);
    d.backend.attention(&qkv, heads, 1.0, &step, 1, &cache, &mut out);
    let (rotated, out) = (d.read(&qkv), d.read(&out));
    for row in (0..rows).filter(|&row| slots[row] != NO_SLOT) {
        for head in 0..q_heads {
            let at = row * cols + head * head_dim;
            let raw = &x[at..at + head_dim];
            let head: Vec<f64> = match norm {
                true => reference::rms_norm(raw, &q_weight, 1e-6),
                false => raw.iter().map(|&x| f64::from(x)).collect(),
            };
            let expected = reference::rope(&head, &inv_freq, 1.25, positions[row]);
            d.assert_close(&rotated[at..at + head_dim], &expected, 1.5, &format!("rotated row {row}"));
        }
        for head in 0..q_heads {
            let kv = q_heads + kv_heads + head / (q_heads / kv_heads);
            let stored = &x[row * cols + kv * head_dim..][..head_dim];
            let got = &out[(row * q_heads + head) * head_dim..][..head_dim];
            assert_eq!(got, stored, "{}: stored V of row {row}", d.name);
        }
    }
}

#[test]
fn rotation_and_store() {
    for mut rng in seeds(&[17]) {
        for (heads, kv_heads, head_dim) in [(9, 3, 64), (2, 2, 80), (4, 1, 128), (6, 2, 96), (2, 1, 256)] {
            let heads = HeadShape { heads, kv_heads, head_dim };
            for (rows, norm) in [(2, false), (41, true), (60, false)] {
                on_every_device!(heads, rotation, heads, norm, rows, &mut rng);
            }
        }
        for head_dim in HEAD_DIMS {
            let heads = random_heads(head_dim, &mut rng);
            for norm in [false, true] {
                let rows = rng.random_range(2..=60);
                on_every_device!(heads, rotation, heads, norm, rows, &mut rng);
            }
        }
    }
}

fn generation<B: Backend>(d: &Device<B>, rng: &mut StdRng) {
    use quire_kernels::{GeneratedMatrix, generated};
    // Columns, and rows, first row and first column of two matrices: parts of their tensors, as a rank has them.
    let drawn: [_; 3] = std::array::from_fn(|_| {
        let parts = [(); 2].map(|()| {
            let first_col = 4 * rng.random_range(0..50);
            (rng.random_range(1..=70), rng.random_range(0..1000), first_col)
        });
        (8 * rng.random_range(1..=50), parts)
    });
    for (cols, parts) in [(136, [(70, 0, 0), (5, 90, 24)])].into_iter().chain(drawn) {
        let parts = parts.map(|(rows, first_row, first_col)| GeneratedMatrix {
            key: rng.random(),
            rows,
            cols,
            first_row,
            first_col,
        });
        let Some(weight) = d.backend.generate_matrix(d.weights, &parts).expect("small") else { return };
        let count = parts[0].rows + parts[1].rows;
        let tokens: Vec<u32> = (0..count as u32).collect();
        let step = d.backend.begin_step(rows(&tokens, &[])).expect("small");
        let mut out = d.poisoned(count, cols);
        d.backend.embed(&step, &weight, &mut out);
        let values = d.read(&out);
        let mut row = 0;
        for part in parts {
            let mut whole = vec![0.0; part.first_col + cols];
            for index in 0..part.rows {
                generated::fill_normal(part.key, part.first_row + index, &mut whole);
                let bytes = weight_bytes(d.weights, &whole[part.first_col..]);
                let mut rounded = vec![0.0; cols];
                quant::dequantize(d.weights, &bytes, &mut rounded).expect("sizes agree");
                assert_eq!(&values[row * cols..][..cols], rounded, "{}: row {row}, {part:?}", d.name);
                row += 1;
            }
        }
    }
}

#[test]
fn weights_made_on_a_device_are_the_hosts() {
    for mut rng in seeds(&[18]) {
        on_every_device!(HEADS, generation, &mut rng);
    }
}
