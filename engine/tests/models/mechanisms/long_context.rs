//! Contexts as long as a model's limit, over a model so small that attention is most of the work.

use std::sync::Arc;

use quire_engine::{
    EngineConfig, KvLayout, ModelExecutor, PolicyConfig, PreemptionConfig, Request, Reservation,
    SamplingParams, SchedulerConfig,
};
use tempfile::TempDir;

use super::{Served, serve};
use crate::random_model::write_folder;

/// The model's limit.
pub(super) const MODEL_LEN: u32 = 131_072;
/// Rows of a batch.
pub(super) const ROWS: u32 = 2048;
const BLOCK_SIZE: u32 = 16;
const OUTPUT: u32 = 24;
const VOCAB: u32 = 256;

/// A folder with the model.
pub(super) fn folder() -> TempDir {
    let config = serde_json::json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 64,
        "vocab_size": VOCAB, "max_position_embeddings": MODEL_LEN, "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0, "tie_word_embeddings": false,
    });
    let folder = tempfile::tempdir().unwrap();
    write_folder(folder.path(), &config, 1);
    folder
}

/// A prompt whose tokens do not repeat at any period.
fn request(id: u64, prompt: u32) -> Request {
    let token =
        |at: u32| (at.wrapping_mul(at).wrapping_mul(2_654_435_761) >> 7).wrapping_add(id as u32) % VOCAB;
    Request {
        id,
        prompt: (0..prompt).map(token).collect(),
        max_tokens: OUTPUT,
        true_output_len: None,
        stop_tokens: Arc::new([]),
        sampling: Arc::new(SamplingParams { temperature: 0.8, seed: id, ..SamplingParams::default() }),
        fork_of: None,
        beam: None,
        priority: 0,
        cache_salt: 0,
    }
}

fn config(model_len: u32, token_budget: u32) -> EngineConfig {
    EngineConfig {
        scheduler: SchedulerConfig {
            policy: PolicyConfig::Continuous { watermark: 0.0 },
            token_budget,
            max_running: 8,
            ..SchedulerConfig::default()
        },
        kv: KvLayout::Paged { block_size: BLOCK_SIZE },
        max_model_len: Some(model_len),
        ..EngineConfig::default()
    }
}

/// Runs sequences of up to `model_len` tokens over executors of so many KV slots.
pub(super) fn check<E: ModelExecutor>(model_len: u32, new: impl Fn(usize) -> E) {
    near_the_limit(model_len, &new);
    too_long_for_the_memory(model_len, &new);
    one_preempts_another(model_len / 2, model_len, &new);
}

/// The longest prompt with the longest output, in chunks of several sizes and in one piece of memory.
fn near_the_limit<E: ModelExecutor>(model_len: u32, new: impl Fn(usize) -> E) {
    // One token more than the limit ends.
    let asked = [Request { max_tokens: OUTPUT + 1, ..request(0, model_len - OUTPUT) }];
    let mut executor = Some(new(model_len as usize));
    let mut run = |config: &EngineConfig| -> Served {
        let (served, back) = serve(executor.take().expect("given back"), config, None, &asked);
        executor = Some(back);
        served
    };
    let expected = run(&config(model_len, ROWS));
    assert!(expected.refusals.is_empty() && expected.outputs[0].len() == OUTPUT as usize);
    let contiguous = KvLayout::Contiguous { reservation: Reservation::Max };
    for config in [config(model_len, ROWS / 3), EngineConfig { kv: contiguous, ..config(model_len, ROWS) }] {
        assert_eq!(run(&config).outputs, expected.outputs, "{config:?}");
    }
}

/// A prompt that the model takes and the KV memory does not hold is refused, and others run.
fn too_long_for_the_memory<E: ModelExecutor>(model_len: u32, new: impl Fn(usize) -> E) {
    let slots = model_len / 2;
    let asked = [request(0, slots + 1), request(1, 40)];
    let (served, _) = serve(new(slots as usize), &config(model_len, ROWS), None, &asked);
    assert_eq!(
        served.refusals,
        [(0, format!("{} KV slots are needed and one sequence can have {slots}", slots + 1))]
    );
    assert!(served.outputs[0].is_empty() && served.outputs[1].len() == OUTPUT as usize);
}

/// Two that fit side by side at first and not as they grow.
fn one_preempts_another<E: ModelExecutor>(prompt: u32, model_len: u32, new: impl Fn(usize) -> E) {
    let asked = [request(0, prompt), request(1, prompt - 7)];
    let slots = 2 * prompt.next_multiple_of(BLOCK_SIZE) as usize + BLOCK_SIZE as usize;
    let mut executor = new(slots);
    let mut alone = Vec::new();
    for request in &asked {
        let request = Request { id: 0, ..request.clone() };
        let (served, back) = serve(executor, &config(model_len, ROWS), None, &[request]);
        executor = back;
        alone.extend(served.outputs);
    }
    for preemption in [PreemptionConfig::Recompute {}, PreemptionConfig::Swap { bytes: 1 << 28 }] {
        let config = EngineConfig { preemption, ..config(model_len, ROWS) };
        let (served, back) = serve(executor, &config, None, &asked);
        executor = back;
        assert_eq!(served.outputs, alone, "{preemption:?}");
        assert!(served.preempted > 0, "{preemption:?}: both fit");
        // Long prompts are still computed, some half of it, when the other one's output needs its memory.
        assert!(
            preemption.is_default() || served.swapped > prompt / 4,
            "{preemption:?}: {} swapped",
            served.swapped
        );
    }
}
