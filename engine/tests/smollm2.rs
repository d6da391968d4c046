//! SmolLM2-135M-Instruct's real weights (GGUF, Q4_1) against Hugging Face Transformers on the same weights
//! dequantized to float32: logits, perplexity, greedy text, tokens. `scripts/get-model` fetches the file.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use quire_engine::load::ModelSource;
use quire_engine::model::WeightDtype;
use quire_engine::{ChatMessage, CpuExecutor, CpuExecutorOptions, KvCapacity, ModelExecutor, Tokenizer};
use quire_kernels::KvDtype;
use serde::Deserialize;

#[derive(Deserialize)]
struct Golden {
    tokens: Vec<u32>,
    window: usize,
    stride: usize,
    rows: std::collections::BTreeMap<usize, Vec<f32>>,
    best: Vec<usize>,
    perplexity: f64,
    prompt: Vec<u32>,
    greedy: Vec<u32>,
}

fn golden() -> Golden {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/smollm2.json");
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn source() -> ModelSource {
    let path: PathBuf =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/SmolLM2-135M-Instruct.Q4_1.gguf");
    ModelSource::parse(path.to_str().unwrap())
        .expect("scripts/get-model fetches the model these tests are about")
}

fn executor(dtype: WeightDtype, kv_dtype: KvDtype) -> CpuExecutor {
    let options = CpuExecutorOptions {
        dtype,
        kv: KvCapacity::Slots(512),
        kv_dtype,
        max_batch_rows: 256,
        threads: NonZeroUsize::new(2),
        ..CpuExecutorOptions::default()
    };
    CpuExecutor::load(&source(), &options).unwrap()
}

fn tokenizer() -> Tokenizer {
    source().tokenizer().unwrap()
}

/// Distance of the golden logits, share of positions with the golden best token, and perplexity of the text.
struct Measured {
    distance: f64,
    agreement: f64,
    perplexity: f64,
}

fn measure(executor: &mut CpuExecutor, golden: &Golden) -> Measured {
    let vocab = executor.info().config.vocab;
    let (mut difference, mut norm) = (0.0f64, 0.0f64);
    let (mut agreed, mut nll, mut count) = (0, 0.0f64, 0);
    for (index, window) in golden.tokens.chunks(golden.window).enumerate() {
        let logits = executor.score(window).unwrap();
        let rows: Vec<&[f32]> = logits.chunks_exact(vocab).collect();
        for (row, &next) in rows.iter().zip(&window[1..]) {
            nll -= log_softmax(row, next);
            count += 1;
        }
        if index > 0 {
            continue;
        }
        for (&row, expected) in &golden.rows {
            for (ours, &theirs) in rows[row].iter().step_by(golden.stride).zip(expected) {
                difference += f64::from(ours - theirs).powi(2);
                norm += f64::from(theirs).powi(2);
            }
        }
        let best = |row: &[f32]| (0..vocab).max_by(|&a, &b| row[a].total_cmp(&row[b])).unwrap();
        agreed = rows.iter().zip(&golden.best).filter(|(row, expected)| best(row) == **expected).count();
    }
    let agreement = agreed as f64 / golden.best.len() as f64;
    let perplexity = (nll / f64::from(count)).exp();
    Measured { distance: (difference / norm).sqrt(), agreement, perplexity }
}

fn log_softmax(row: &[f32], token: u32) -> f64 {
    let greatest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let total: f64 = row.iter().map(|&l| f64::from(l - greatest).exp()).sum();
    f64::from(row[token as usize] - greatest) - total.ln()
}

#[test]
fn logits_and_perplexity_are_the_references() {
    let golden = golden();
    // Weight format; tolerances of the logits' distance, of the perplexity's ratio, and least agreement on the best.
    for (dtype, kv, distance, ratio, agreement) in [
        (WeightDtype::F32, KvDtype::F32, 2e-5, 1e-5, 0.999),
        (WeightDtype::Bf16, KvDtype::Bf16, 2e-2, 5e-3, 0.95),
        (WeightDtype::Q8_0, KvDtype::Bf16, 6e-2, 2e-2, 0.94),
        (WeightDtype::Keep, KvDtype::Bf16, 6e-2, 2e-2, 0.94),
        // The file rounded once more, to a coarser format.
        (WeightDtype::Q4_0, KvDtype::Bf16, 0.6, 0.25, 0.6),
    ] {
        let measured = measure(&mut executor(dtype, kv), &golden);
        let ppl = (measured.perplexity / golden.perplexity - 1.0).abs();
        println!(
            "{dtype}: distance {:.2e}, perplexity {:.4} (reference {:.4}, off by {ppl:.2e}), best token {:.3}",
            measured.distance, measured.perplexity, golden.perplexity, measured.agreement
        );
        assert!(measured.distance < distance, "{dtype}: distance {:.2e}", measured.distance);
        assert!(ppl < ratio, "{dtype}: perplexity off by {ppl:.2e}");
        assert!(measured.agreement >= agreement, "{dtype}: best token {:.3}", measured.agreement);
    }
}

#[test]
fn greedy_text_is_the_references() {
    let golden = golden();
    let mut executor = executor(WeightDtype::F32, KvDtype::F32);
    let vocab = executor.info().config.vocab;
    let mut tokens = golden.prompt.clone();
    for &expected in &golden.greedy {
        let logits = executor.score(&tokens).unwrap();
        let last = &logits[logits.len() - vocab..];
        let best = (0..vocab).max_by(|&a, &b| last[a].total_cmp(&last[b])).unwrap() as u32;
        assert_eq!(best, expected, "after {:?}", tokenizer().decode(&tokens));
        tokens.push(best);
    }
}

#[test]
fn text_becomes_the_references_tokens() {
    let tokenizer = tokenizer();
    let golden = golden();
    let text =
        std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/text.txt")).unwrap();
    assert_eq!(tokenizer.encode(&text).unwrap(), golden.tokens);
    // As llama.cpp and Transformers split these.
    for (text, expected) in [
        (
            "I'll pay 1234 for 5 naïve  cafés\n\n\tdéjà vu! 日本語 🙂 <|im_end|>x",
            vec![
                57, 3060, 2290, 216, 33, 34, 35, 36, 327, 216, 37, 15486, 46494, 216, 20879, 17842, 1116,
                197, 84, 2756, 90, 16739, 386, 101, 17, 17097, 241, 115, 40993, 179, 120, 248, 47526, 216, 2,
                104,
            ],
        ),
        (
            "Hello   world  \n \n  def f(x):\n\t\treturn x**2 # 3.14 ok?!",
            vec![
                19556, 256, 905, 32057, 3717, 216, 753, 275, 24, 104, 727, 3354, 197, 5406, 1792, 828, 34,
                907, 216, 35, 30, 33, 36, 10907, 17593,
            ],
        ),
        (
            "THEY'RE it's I'd ①② ½ ٣٤ a\u{301} \u{200d} e\r\nf",
            vec![
                15964, 73, 23, 3256, 357, 506, 339, 6737, 216, 173, 235, 250, 173, 235, 111, 216, 16738, 216,
                164, 113, 164, 114, 253, 151, 219, 459, 231, 297, 201, 198, 86,
            ],
        ),
    ] {
        assert_eq!(tokenizer.encode(text).unwrap(), expected, "{text}");
    }
}

#[test]
fn streamed_text_is_the_whole_text_and_never_splits_a_character() {
    let tokenizer = tokenizer();
    let text = "naïve 日本語 🙂👩‍👩‍👧 done \n\n  ok";
    let tokens = tokenizer.encode(text).unwrap();
    let mut stream = tokenizer.stream();
    let pieces: Vec<String> = tokens.iter().map(|&t| stream.push(t).unwrap()).collect();
    assert!(pieces.iter().all(|piece| !piece.contains('\u{FFFD}')), "{pieces:?}");
    assert!(pieces.iter().filter(|piece| piece.is_empty()).count() >= 3, "{pieces:?}");
    assert_eq!(pieces.concat() + &stream.finish().unwrap(), text);
    // An output that ends inside a character says so at its end.
    let mut stream = tokenizer.stream();
    let cut: String =
        tokenizer.encode("a 日").unwrap()[..3].iter().map(|&t| stream.push(t).unwrap()).collect();
    assert_eq!(cut + &stream.finish().unwrap(), "a \u{FFFD}");
}

#[test]
fn the_chat_template_opens_the_assistants_turn() {
    let tokenizer = tokenizer();
    let tokens = tokenizer.encode_chat(&[ChatMessage::new("user", "Hi")]).unwrap();
    let text: Vec<String> = tokens.iter().map(|&t| tokenizer.token(t).unwrap()).collect();
    assert_eq!(text[0], "<|im_start|>");
    let rendered =
        tokenizer.chat_template().unwrap().render(&[ChatMessage::new("user", "Hi")], true).unwrap();
    assert!(
        rendered.starts_with("<|im_start|>system\nYou are a helpful AI assistant named SmolLM"),
        "{rendered}"
    );
    assert!(rendered.ends_with("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"), "{rendered}");
    assert_eq!(tokenizer.stop_tokens(), [0, 2]);
}
