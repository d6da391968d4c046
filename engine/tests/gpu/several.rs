//! A model over two GPUs, or four, against one, and engines over both. `scripts/gpu-check --two`, `--four`.

use quire_engine::{CudaExecutor, CudaExecutorOptions, ModelExecutor, TensorParallel};
use quire_kernels::KvDtype;

use super::{decode, distance, in_f16, options, overlapping_steps_sample_what_others_do, source, tokens};

const SHAPE: &str = "qwen3-0.6b";

fn over(ranks: usize, options: &CudaExecutorOptions) -> TensorParallel {
    TensorParallel::load_cuda(&source(SHAPE), options, ranks, &mut |_, _| {}).expect("so many GPUs and NCCL")
}

#[test]
#[ignore = "needs two GPUs: scripts/gpu-check --two"]
fn two_gpus_logits_are_those_of_one() {
    logits_are_those_of_one(2);
}

#[test]
#[ignore = "needs four GPUs: scripts/gpu-check --four"]
fn four_gpus_logits_are_those_of_one() {
    logits_are_those_of_one(4);
}

fn logits_are_those_of_one(ranks: usize) {
    // Each part of a sum is rounded once more than the whole is. Of KV in fp8 what differs so little may fall to either side
    // of a step, and steps are a sixteenth apart: as much as fp8 itself costs (`narrower_kv_memory_costs_little`).
    let fp8 = CudaExecutorOptions { kv_dtype: KvDtype::Fp8, ..options(8192) };
    for (options, bound) in [(options(8192), 3e-2), (fp8, 6e-2)] {
        let mut one = CudaExecutor::load(&source(SHAPE), &options).unwrap();
        let mut several = over(ranks, &options);
        let text = tokens(150, 1);
        let expected = one.score(&text).unwrap().into_owned();
        let error = distance(&several.score(&text).unwrap(), &expected);
        let kv = options.kv_dtype.name();
        println!("{SHAPE} over {ranks}, KV of {kv}: relative difference {error:.2e}");
        assert!(error > 0.0 && error < bound, "KV of {kv}: {error:.2e}");
        let texts: Vec<Vec<u32>> = (0..17).map(|sequence| tokens(45, sequence)).collect();
        let decoded = |gpu: &mut dyn ModelExecutor| decode(gpu, &texts, &[40; 17], 5);
        let [expected, several] = [decoded(&mut one), decoded(&mut several)];
        for (step, (several, expected)) in several.iter().zip(&expected).enumerate() {
            let error = distance(several, expected);
            assert!(error < bound, "KV of {kv}, decode {step}: {error:.2e}");
        }
    }
}

#[test]
#[ignore = "needs two GPUs: scripts/gpu-check --two"]
fn two_gpus_graphs_compute_what_queued_operations_do() {
    graphs_compute_what_queued_operations_do(2);
}

#[test]
#[ignore = "needs four GPUs: scripts/gpu-check --four"]
fn four_gpus_graphs_compute_what_queued_operations_do() {
    graphs_compute_what_queued_operations_do(4);
}

fn graphs_compute_what_queued_operations_do(ranks: usize) {
    let texts: Vec<Vec<u32>> = (0..33).map(|sequence| tokens(41, sequence)).collect();
    for sequences in [1, 5, 33] {
        let logits = |graphs| {
            let mut several = over(ranks, &CudaExecutorOptions { graphs, ..options(8192) });
            decode(&mut several, &texts[..sequences], &vec![40; sequences], 1).remove(0)
        };
        let error = distance(&logits(true), &logits(false));
        println!("{sequences} sequences: relative difference {error:.2e}");
        assert!(error < 2e-2, "{sequences} sequences: {error:.2e}");
    }
}

/// A step under way samples tokens that the next one takes on both GPUs before the host knows them.
#[test]
#[ignore = "needs two GPUs: scripts/gpu-check --two"]
fn two_gpus_steps_that_overlap_sample_what_others_do() {
    overlapping_steps_sample_what_others_do(over(2, &options(16_384)));
}

#[test]
#[ignore = "needs four GPUs: scripts/gpu-check --four"]
fn four_gpus_steps_that_overlap_sample_what_others_do() {
    overlapping_steps_sample_what_others_do(over(4, &options(16_384)));
}

#[test]
#[ignore = "needs two GPUs: scripts/gpu-check --two"]
fn two_gpus_say_what_cannot_be() {
    let error = |options: CudaExecutorOptions, ranks| {
        let loaded = TensorParallel::load_cuda(&source(SHAPE), &options, ranks, &mut |_, _| {});
        loaded.unwrap_err().to_string()
    };
    // The second rank's, and the first has it too instead of waiting.
    let last = CudaExecutorOptions { device: 63, ..options(64) };
    assert!(error(last, 2).contains("no GPU 6"));
    assert!(error(options(64), 3).contains("16 heads"));
    assert!(error(in_f16(64), 2).contains("choose bf16"));
    assert!(
        error(CudaExecutorOptions { batch_invariant: true, ..options(64) }, 4).contains("batch_invariant")
    );
}
