//! Systems that refuse, fail, stop or cannot start: what of that is seen, and where.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use quire_experiments::compare::{CompareOptions, compare};
use quire_experiments::config::Source;
use quire_experiments::metrics::{Known, LOSS_SHARE, Metric};
use quire_experiments::plot::{Picture, run_figure};
use quire_experiments::record::CellStatus;
use quire_experiments::systems::Launched;
use quire_experiments::table::table;
use quire_experiments::{Experiment, RunData, Settings, Target};
use quire_workloads::SystemError;
use quire_workloads::mock::{Script, ScriptedSystem, VirtualClock};

use super::figures::resolve;
use super::scripted::{CONFIG, experiment, ms};

/// Serves every request but, at rates above the lowest, those for which `refuses` holds.
fn picky(
    refuses: impl Fn(u64) -> bool + Clone + Send + 'static,
) -> impl FnMut(&Settings) -> Result<Launched, SystemError> {
    // A system is launched anew for each cell: the first has the lowest rate.
    let mut cell = 0;
    move |_: &Settings| {
        cell += 1;
        let (clock, refuses, late) = (VirtualClock::new(), refuses.clone(), cell > 1);
        let system = ScriptedSystem::new(clock.clone(), move |request| match late && refuses(request.id) {
            true => Script::default().rejected(ms(1), "no room"),
            false => Script::healthy(request, ms(100), ms(10)),
        });
        Ok(Launched { system: Box::new(system), clock: Arc::new(clock) })
    }
}

fn run(folder: &Path, wide: impl FnMut(&Settings) -> Result<Launched, SystemError> + 'static) -> RunData {
    let mut experiment = experiment("--quick --only wide", ms(10)).external("wide", wide);
    let folder = experiment.run(&Target::New(folder.to_owned()), &AtomicBool::new(false)).unwrap();
    RunData::load(&folder).unwrap()
}

#[test]
fn a_system_that_rejects_requests_is_overloaded_however_fast_it_serves_the_others() {
    let temp = tempfile::tempdir().unwrap();
    let data = run(&temp.path().join("new"), picky(|id| id % 2 == 0));
    let [at_1, at_8, at_16] = [1.0, 8.0, 16.0].map(|rate| data.at("fixed", "wide", rate));
    assert!(!at_1.hollow() && at_8.hollow() && at_8.overloaded() && !at_8.saturated());
    assert!(at_8.lost() as f64 > LOSS_SHARE * 40.0);
    assert!(at_8.cells[0].entry.overloaded && at_16.skipped(), "it ends the line");
    let capacity = data.capacity("fixed", "wide").unwrap();
    assert_eq!((capacity.rate, capacity.known), (1.0, Some(Known::Exactly)), "no latency bound is kept at 8");
    let Picture::Lines(figure) = run_figure(&data) else { panic!("a figure of lines") };
    let hollow: Vec<bool> = figure.columns[0].series[0][0].iter().map(|point| point.hollow).collect();
    assert_eq!(hollow, [false, true]);
    let caption = figure.caption.join("\n");
    assert!(caption.contains("Hollow: more than 1% of requests were rejected or failed"), "{caption}");
    assert!(!table(&data).contains("--rates-times"), "it kept up with one rate");

    let old = run(&temp.path().join("old"), picky(|_| false));
    assert_eq!(old.capacity("fixed", "wide").unwrap().known, Some(Known::AtLeast));
    let options = CompareOptions { max_regression: 0.05, absolute: true };
    let found = compare(&old, &data, options).unwrap();
    let text = found.to_string();
    assert!(found.regressed() && text.contains("rejected or failed requests"), "{text}");
    assert!(text.contains("requests of wide in fixed: rejected 0 -> 20"), "{text}");
}

#[test]
fn one_that_loses_requests_at_its_lowest_rate_has_no_capacity_but_a_bound() {
    let temp = tempfile::tempdir().unwrap();
    let all = |_: &Settings| {
        let clock = VirtualClock::new();
        let system = ScriptedSystem::new(clock.clone(), |_| Script::default().failed(ms(1), "broken"));
        Ok(Launched { system: Box::new(system), clock: Arc::new(clock) })
    };
    let data = run(&temp.path().join("run"), all);
    assert_eq!(data.capacity("fixed", "wide"), None);
    assert_eq!(data.at("fixed", "wide", 1.0).estimate(Metric::NormalizedLatency), None);
    let text = table(&data);
    assert!(text.contains("rejected or failed requests at its lowest already: below 1 requests/s"), "{text}");
    assert!(!text.contains("--rates-times"), "its rates are not to blame: {text}");
}

#[test]
fn rates_that_nothing_keeps_up_with_are_said_to_be_too_high() {
    let temp = tempfile::tempdir().unwrap();
    let slow = |_: &Settings| {
        let clock = VirtualClock::new();
        let system = ScriptedSystem::new(clock.clone(), |request| {
            // Each later than the one before by nearly the time between them.
            Script::healthy(request, ms(900 * request.id), ms(10))
        });
        Ok(Launched { system: Box::new(system), clock: Arc::new(clock) })
    };
    let data = run(&temp.path().join("run"), slow);
    assert!(data.at("fixed", "wide", 1.0).saturated());
    let text = table(&data);
    assert!(
        text.contains("In fixed every system is saturated") && text.contains("--rates-times 0.5"),
        "{text}"
    );
}

/// Stops after so much of its first cell's time, as an engine does that panics.
fn stops(after: Duration) -> impl FnMut(&Settings) -> Result<Launched, SystemError> {
    move |_: &Settings| {
        let clock = VirtualClock::new();
        let system = ScriptedSystem::healthy(clock.clone(), ms(100), ms(10)).named("engine").stops_at(after);
        Ok(Launched { system: Box::new(system), clock: Arc::new(clock) })
    }
}

#[test]
fn a_system_that_stopped_is_named_as_the_reason() {
    let temp = tempfile::tempdir().unwrap();
    let data = run(&temp.path().join("run"), stops(ms(4000)));
    let CellStatus::Void { reason } = &data.cells[0].entry.status else { panic!("{:?}", data.cells) };
    assert_eq!(reason, "the system stopped: it was told to");
    let Picture::Lines(figure) = run_figure(&data) else { panic!("a figure of lines") };
    let caption = figure.caption.join("\n");
    assert!(caption.contains("void and not shown: the system stopped (it was told to)."), "{caption}");
    assert!(!caption.contains("client"), "{caption}");
    let why = data.unusable().unwrap();
    assert!(why.contains("wide in fixed at 1 requests/s") && why.contains("it was told to"), "{why}");
    assert_eq!(run(&temp.path().join("fine"), picky(|_| false)).unusable(), None);
}

/// A text of the scripted configuration with an engine of its model in the place of its wide system; `more` are keys of it.
fn with_engine(config: &str, kv: &str, more: &str) -> Experiment {
    let engine = format!(
        "serve = {{ kind = \"engine\", scheduler = {{ policy = {{ kind = \"continuous\" }}, token_budget = 64, \
         max_running = 4, max_waiting = 100 }}, kv = {kv}{more} }}"
    );
    let head = config.rfind("serve = { kind = \"external\" }").unwrap();
    let text = format!("{}{engine}\n", &config[..head]);
    let (source, settings) = resolve(&text, "--quick --only wide").unwrap();
    Experiment::new(source, settings, Vec::new()).quiet()
}

#[test]
fn settings_that_cannot_start_are_found_before_the_first_cell() {
    let temp = tempfile::tempdir().unwrap();
    let folder = temp.path().join("run");
    // A million bytes are 10 tokens of this model in 32 bits: not a block.
    let mut experiment = with_engine(CONFIG, "{ kind = \"paged\", block_size = 256 }", "");
    let error =
        experiment.run(&Target::New(folder.clone()), &AtomicBool::new(false)).unwrap_err().to_string();
    assert!(error.contains("cannot start wide: ") && !error.contains("--resume"), "{error}");
    assert!(!folder.exists(), "no run is left that could not go on");
    assert_eq!(experiment.check().unwrap_err().to_string(), error, "a dry run says the same");
    with_engine(CONFIG, TOKENS, "").check().unwrap();
}

/// KV memory in blocks of one token.
const TOKENS: &str = "{ kind = \"paged\", block_size = 1 }";

#[test]
fn a_dry_run_says_what_the_start_would() {
    let at = |from: &str, to: &str| {
        assert!(CONFIG.contains(from), "{from}");
        CONFIG.replacen(from, to, 1)
    };
    let kv_bytes = |bytes: u64| at("kv_bytes = 1_000_000", &format!("kv_bytes = {bytes}"));
    // K and V of a token of this model in 32 bits.
    let token = 46_080;
    let swap = |bytes: u64| format!(", preemption = {{ kind = \"swap\", bytes = {bytes} }}");
    let drafted = ", draft_model = \"dummy:smollm2-135m\", \
                   speculation = { drafter = { kind = \"model\" }, length = { kind = \"fixed\", tokens = 2 } }";
    // The context of this model is longer than the draft model's.
    let longer = at("dummy:smollm2-135m", "dummy:llama-3.2-1b").replacen(
        "max_model_len = 256",
        "max_model_len = 9000",
        1,
    );
    let ranks = |ranks: u32| at("kv_bytes =", &format!("tensor_parallel = {ranks}\nkv_bytes ="));
    let most = "choose enough for 1 to 4294967294";
    for (config, more, parts) in [
        (kv_bytes(token - 1), String::new(), ["kv_bytes is 46079, room for 0 tokens: ", most]),
        (
            kv_bytes(token << 32),
            String::new(),
            ["kv_bytes is 197912092999680, room for 4294967296 tokens", most],
        ),
        (CONFIG.into(), swap(token - 1), ["preemption.bytes is 46079, room for 0 tokens", most]),
        (
            CONFIG.into(),
            swap(token << 32),
            ["preemption.bytes is 197912092999680, room for 4294967296", most],
        ),
        // Nine heads over two devices.
        (
            ranks(2),
            String::new(),
            ["2 devices cannot have equal shares of this model's 9 heads", "tensor_parallel"],
        ),
        (longer, drafted.into(), ["its draft model: max_model_len is 9000: choose 1 to 8192", "made for"]),
    ] {
        let error = with_engine(&config, TOKENS, &more).check().unwrap_err().to_string();
        assert!(error.contains("cannot start wide: "), "{error}");
        assert!(parts.iter().all(|part| error.contains(part)), "{error}");
    }
    with_engine(&kv_bytes(token * 300), TOKENS, &swap(token)).check().unwrap();
    with_engine(CONFIG, TOKENS, drafted).check().unwrap();
    // The draft model is on one device: nothing of it need be divided.
    with_engine(&ranks(3), TOKENS, drafted).check().unwrap();
    // Room for as many tokens as can be numbered: the books of their blocks are not made for a check.
    with_engine(&kv_bytes((token << 32) - 2 * token), TOKENS, &swap(token)).check().unwrap();
}

/// The scripted configuration with a trace's lengths.
fn traced() -> (Source, Settings) {
    let lengths = CONFIG.find("lengths = {").unwrap();
    let end = CONFIG[lengths..].find('\n').unwrap() + lengths;
    let trace = "lengths = { kind = \"trace\", path = \"no/such/nope.csv\" }";
    resolve(&format!("{}{trace}{}", &CONFIG[..lengths], &CONFIG[end..]), "--quick").unwrap()
}

#[test]
fn captions_say_what_was_replayed_and_whose_model_it_is() {
    let (_, settings) = traced();
    assert_eq!(settings.describe_traces().as_deref(), Some("Requests have lengths of the trace nope."));
    let server = "serve = { kind = \"openai\", url = \"http://localhost:1/v1\", model = \"their/own\", ignore_eos = true }";
    let text = CONFIG.replacen("serve = { kind = \"external\" }", server, 1);
    let of = |only: &str| resolve(&text, &format!("--quick {only}")).unwrap().1;
    let alone = of("--only narrow");
    assert_eq!(alone.describe_traces(), None);
    assert_eq!(alone.describe_model(), "Model: their/own, as a server elsewhere has it");
    assert!(alone.describe_memory().starts_with("Limit 256 tokens"), "{}", alone.describe_memory());
    let both = of("");
    assert!(both.describe_model().contains("dummy") && both.describe_memory().contains("KV memory"));
}

#[test]
fn a_trace_that_is_not_there_is_found_by_a_dry_run() {
    let (source, settings) = traced();
    let error = Experiment::new(source, settings, Vec::new()).quiet().check().unwrap_err();
    let text = format!("{:#}", anyhow::Error::from(error));
    assert!(text.contains("nope.csv") && text.contains("scripts/get-traces"), "{text}");
    assert_eq!(text.matches("os error 2").count(), 1, "said once: {text}");
}
