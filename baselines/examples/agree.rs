//! Runs the same requests through the naive server and the real Transformers, in static batches and in its continuous
//! ones, and says whether their tokens agree.
//!
//! `cargo run --release -p quire-baselines --example agree -- FOLDER [PYTHON]`, with a Hugging Face folder of a
//! Llama-family model and a Python that has torch, transformers and psutil.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use quire_baselines::naive::{NaiveModel, NaiveOptions, NaiveServer};
use quire_baselines::transformers::{
    TransformersBatching, TransformersModel, TransformersOptions, TransformersServer,
};
use quire_workloads::{Clock, Decoding, EventKind, GenerationRequest, ServingSystem, WallClock};

type Failure = Box<dyn std::error::Error>;

const BATCH: usize = 4;
const REQUESTS: u64 = 10;

fn requests(vocab: usize) -> Vec<GenerationRequest> {
    (0..REQUESTS)
        .map(|id| GenerationRequest {
            id,
            prompt: (0..5 + 17 * id).map(|i| ((i * 7919 + id * 104_729) % vocab as u64) as u32).collect(),
            max_tokens: 64,
            true_output_len: Some(8 + 5 * id as u32),
            class: 0,
            decoding: Decoding::Single {},
        })
        .collect()
}

/// Sends everything at once and prints what it took.
fn serve(
    system: &mut dyn ServingSystem,
    clock: WallClock,
    requests: &[GenerationRequest],
) -> Result<BTreeMap<u64, Vec<u32>>, Failure> {
    let begun = clock.now();
    for request in requests {
        system.submit(request.clone())?;
    }
    let mut outputs: BTreeMap<u64, Vec<u32>> = BTreeMap::new();
    let mut open = requests.len();
    let mut preemptions = 0;
    while open > 0 {
        let event =
            system.next_event(clock.now() + Duration::from_secs(120))?.ok_or("nothing for two minutes")?;
        match event.kind {
            EventKind::Tokens(tokens) => outputs.entry(event.request).or_default().extend(tokens),
            EventKind::Finished { preemptions: times, .. } => {
                open -= 1;
                preemptions += times;
            }
            other => return Err(format!("request {}: {other:?}", event.request).into()),
        }
    }
    let tokens: usize = outputs.values().map(Vec::len).sum();
    let seconds = (clock.now() - begun).as_secs_f64();
    let steps = system.take_steps();
    let computing: f64 = steps.iter().map(|s| s.execute_s + s.sample_s).sum();
    println!(
        "{:12} {tokens} tokens in {seconds:.2} s, {} steps, {computing:.2} s of them computing, {preemptions} preemptions",
        system.name(),
        steps.len()
    );
    Ok(outputs)
}

fn main() -> Result<(), Failure> {
    let mut arguments = std::env::args_os().skip(1);
    let folder = PathBuf::from(arguments.next().ok_or("usage: agree FOLDER [PYTHON]")?);
    let python = arguments.next().map_or("python3".into(), PathBuf::from);
    let clock = WallClock::start();
    let model = NaiveModel::from_hf_folder(&folder)?;
    let config = model.config();
    let (requests, slot_bytes) = (requests(config.vocab_size), config.kv_bytes_per_token());
    let options = NaiveOptions { batch_size: BATCH, ..NaiveOptions::default() };
    let naive = serve(&mut NaiveServer::start(model, &options, clock)?, clock, &requests)?;
    let batchings = [
        (TransformersBatching::Static { batch_size: BATCH, timeout: Duration::from_millis(100) }, None),
        // Splits prompts, and preempts: a single one of the longest requests fits in this memory.
        (
            TransformersBatching::Continuous { token_budget: 48, max_running: BATCH, block_size: 16 },
            Some(256),
        ),
    ];
    let mut differ = false;
    for (batching, kv_slots) in batchings {
        let options = TransformersOptions {
            python: python.clone(),
            batching,
            kv_bytes: kv_slots.map(|slots: u64| slots * slot_bytes),
            ..TransformersOptions::new(TransformersModel::Folder(folder.clone()))
        };
        let mut server = TransformersServer::start(&options, clock)?;
        println!("{batching:?} {:?}", server.versions());
        let real = serve(&mut server, clock, &requests)?;
        let agreeing = naive.iter().filter(|(id, tokens)| real.get(id) == Some(tokens)).count();
        println!("{agreeing} of {} requests agree in every token", requests.len());
        differ |= agreeing < requests.len();
    }
    if differ { Err("the two differ".into()) } else { Ok(()) }
}
