//! The engine as a serving system.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use quire_engine::speculation::DraftModel;
use quire_engine::{
    DrafterConfig, Engine, EngineConfig, EngineError, EngineParts, EngineService, Executor, KvCopy, KvLayout,
    PolicyConfig, PreemptionConfig, SampleRow, Sampled, ScheduledBatch, SchedulerConfig, SpeculationConfig,
    StepStats,
};
use quire_workloads::{
    Decoding, EventKind, GenerationRequest, ServingSystem, StepRecord, SystemError, TokenEvent, WallClock,
};
use serde::{Deserialize, Serialize};

use super::outputs::Outputs;
use super::{Launched, Models, StartListener, start_error};
use crate::config::EngineChanges;
use crate::settings::Settings;

const NAME: &str = "engine";

/// Settings of the engine: the switches that a figure compares.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EngineSystem {
    /// What runs when.
    pub scheduler: SchedulerConfig,
    /// How KV slots are given out.
    pub kv: KvLayout,
    /// Whether full blocks are kept for later requests that begin alike; paged KV only.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub prefix_cache: bool,
    /// Whether samples and beams of one prompt share its blocks. Not written where it is on, as it is in all older runs.
    #[serde(default = "on", skip_serializing_if = "is_on")]
    pub share_blocks: bool,
    /// What becomes of the K and V of a sequence that is preempted.
    #[serde(default, skip_serializing_if = "PreemptionConfig::is_default")]
    pub preemption: PreemptionConfig,
    /// Whether and how tokens are proposed and verified several at a time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub speculation: Option<SpeculationConfig>,
    /// The model that proposes, where `speculation.drafter` is `model`: as the configuration's `model`, with weights and KV
    /// of the same precision. Its KV memory comes on top of `kv_bytes`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub draft_model: Option<String>,
}

fn on() -> bool {
    true
}

fn is_on(switch: &bool) -> bool {
    *switch
}

impl EngineSystem {
    pub(super) fn check(&self) -> Result<(), String> {
        let drafter = self.speculation.as_ref().map(|speculation| &speculation.drafter);
        if matches!(drafter, Some(DrafterConfig::Model {})) != self.draft_model.is_some() {
            return Err(
                "`draft_model` and speculation with drafter = { kind = \"model\" } go together".into()
            );
        }
        self.config(None).validate().map_err(|e| e.to_string())
    }

    /// Checks that it gives what is wanted of a prompt.
    pub(super) fn check_decoding(&self, decoding: Decoding) -> Result<(), String> {
        let fixed = matches!(self.scheduler.policy, PolicyConfig::Static { .. });
        if fixed && matches!(decoding, Decoding::Beam { .. }) {
            return Err("a beam search needs a policy that admits while others run, not `static`".into());
        }
        if self.speculation.is_some() && matches!(decoding, Decoding::Beam { .. }) {
            return Err("nothing is proposed for the beams of a search: leave `speculation` out".into());
        }
        Ok(())
    }

    /// Rows of logits that a step may want.
    pub(super) fn logit_rows(&self) -> usize {
        let SchedulerConfig { max_running, token_budget, .. } = self.scheduler;
        let drafted = self.speculation.as_ref().map_or(0, |speculation| speculation.length.most());
        max_running.saturating_mul(1 + drafted).min(token_budget) as usize
    }

    /// Whether a program must give its policy or its drafter.
    pub(crate) fn has_external_parts(&self) -> bool {
        let drafter = self.speculation.as_ref().map(|speculation| &speculation.drafter);
        self.scheduler.policy == PolicyConfig::External {}
            || matches!(drafter, Some(DrafterConfig::External {}))
    }

    /// Whether chance decides which proposed tokens are accepted.
    pub(crate) fn is_synthetic(&self) -> bool {
        let drafter = self.speculation.as_ref().map(|speculation| &speculation.drafter);
        matches!(drafter, Some(DrafterConfig::Synthetic { .. }))
    }

    /// Whether the model, or another one, proposes tokens.
    pub(crate) fn drafts_by_model(&self) -> bool {
        let drafter = self.speculation.as_ref().map(|speculation| &speculation.drafter);
        matches!(drafter, Some(DrafterConfig::EarlyExit { .. } | DrafterConfig::Model {}))
    }

    /// Puts another device's settings in place.
    pub(crate) fn change(&mut self, changes: EngineChanges) {
        let scheduler = &mut self.scheduler;
        scheduler.token_budget = changes.token_budget.unwrap_or(scheduler.token_budget);
        scheduler.max_running = changes.max_running.unwrap_or(scheduler.max_running);
        if let (KvLayout::Paged { block_size }, Some(new)) = (&mut self.kv, changes.block_size) {
            *block_size = new;
        }
        if let (PreemptionConfig::Swap { bytes }, Some(new)) = (&mut self.preemption, changes.swap_bytes) {
            *bytes = new;
        }
    }

    pub(super) fn config(&self, max_model_len: Option<u32>) -> EngineConfig {
        EngineConfig {
            scheduler: self.scheduler.clone(),
            kv: self.kv,
            prefix_cache: self.prefix_cache,
            share_blocks: self.share_blocks,
            preemption: self.preemption,
            speculation: self.speculation.clone(),
            max_model_len,
        }
    }

    /// What a program gives is not to take the place of what the configuration names, nor the other way round.
    fn check_parts(&self, parts: &EngineParts) -> Result<(), &'static str> {
        if parts.policy.is_some() && self.scheduler.policy != (PolicyConfig::External {}) {
            return Err(
                "a policy was given, and the configuration names another: write { kind = \"external\" }",
            );
        }
        if parts.drafter.is_some() && self.draft_model.is_some() {
            return Err(
                "a drafter was given, and the configuration has a `draft_model`: leave one of them out",
            );
        }
        Ok(())
    }

    /// Starts it, with `parts` in the place of its own.
    pub(crate) fn launch(
        &self,
        settings: &Settings,
        models: &mut Models,
        mut parts: EngineParts,
    ) -> Result<Launched, SystemError> {
        let start = |e: EngineError| start_error(NAME, e);
        self.check_parts(&parts).map_err(|what| start(EngineError::Config(what.into())))?;
        let executor = models.executor(settings).map_err(start)?;
        if let Some(model) = &self.draft_model {
            let draft = models.draft_executor(settings, model).map_err(start)?;
            parts.drafter = Some(Box::new(DraftModel::new(Box::new(draft))));
        }
        let config = self.config(Some(settings.max_model_len));
        let engine = Engine::with_parts(executor, &config, parts).map_err(start)?;
        let clock = WallClock::start();
        let service = EngineService::spawn(engine).map_err(start)?;
        let system = EngineServing { service, clock, outputs: Outputs::default(), next: None };
        Ok(Launched { system: Box::new(system), clock: Arc::new(clock) })
    }
}

/// An executor that several engines use one after the other, so that weights are loaded once. Each cell's engine
/// starts with an empty pool and an empty prefix cache: what lies in the KV memory from before is never read.
#[derive(Debug)]
pub(super) struct SharedExecutor<E>(Arc<Mutex<E>>, StartListener);

impl<E> SharedExecutor<E> {
    pub(super) fn new(executor: E, listener: &StartListener) -> Self {
        Self(Arc::new(Mutex::new(executor)), listener.clone())
    }

    /// The same executor, whose next start another hears of.
    pub(super) fn heard_by(&self, listener: &StartListener) -> Self {
        Self(Arc::clone(&self.0), listener.clone())
    }

    pub(super) fn lock(&self) -> std::sync::MutexGuard<'_, E> {
        // A panic inside a forward pass ended that engine; buffers are overwritten by the next.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<E> Clone for SharedExecutor<E> {
    fn clone(&self) -> Self {
        self.heard_by(&self.1)
    }
}

impl<E: Executor> Executor for SharedExecutor<E> {
    fn runs_beside_host(&self) -> bool {
        self.lock().runs_beside_host()
    }
    fn kv_slots(&self) -> usize {
        self.lock().kv_slots()
    }
    fn max_model_len(&self) -> usize {
        self.lock().max_model_len()
    }
    fn vocab_size(&self) -> usize {
        self.lock().vocab_size()
    }
    fn max_batch_rows(&self) -> usize {
        self.lock().max_batch_rows()
    }
    fn max_sequences(&self) -> usize {
        self.lock().max_sequences()
    }
    fn max_logit_rows(&self) -> usize {
        self.lock().max_logit_rows()
    }
    fn layers(&self) -> Option<usize> {
        self.lock().layers()
    }
    fn forward_layers(&mut self, batch: &ScheduledBatch, layers: usize) -> Result<(), EngineError> {
        self.lock().forward_layers(batch, layers)
    }
    fn reserve_host(&mut self, bytes: u64) -> Result<usize, EngineError> {
        self.lock().reserve_host(bytes)
    }
    fn copy_kv(&mut self, copies: &[KvCopy]) -> Result<(), EngineError> {
        self.lock().copy_kv(copies)
    }
    fn prepare(
        &mut self,
        layout: KvLayout,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<(), EngineError> {
        let listener = &self.1;
        self.lock().prepare(layout, &mut |done, sizes| {
            listener.hear("capturing graphs", done, sizes);
            progress(done, sizes);
        })
    }
    fn forward(&mut self, batch: &ScheduledBatch) -> Result<(), EngineError> {
        self.lock().forward(batch)
    }
    fn sample(&mut self, rows: &[SampleRow]) -> Result<(), EngineError> {
        self.lock().sample(rows)
    }
    fn collect(&mut self) -> Result<Vec<Sampled>, EngineError> {
        self.lock().collect()
    }
}

/// An engine on its thread, driven by the load generator.
struct EngineServing {
    service: EngineService,
    clock: WallClock,
    outputs: Outputs,
    /// What comes with the event given out last.
    next: Option<TokenEvent>,
}

fn stopped(error: EngineError) -> SystemError {
    let reason = match error {
        EngineError::Stopped(reason) => reason,
        other => other.to_string(),
    };
    SystemError::Stopped { system: NAME.into(), reason }
}

impl ServingSystem for EngineServing {
    fn name(&self) -> &str {
        NAME
    }

    fn submit(&mut self, request: GenerationRequest) -> Result<(), SystemError> {
        for request in self.outputs.requests(request) {
            self.service.submit(request).map_err(stopped)?;
        }
        Ok(())
    }

    fn cancel(&mut self, request: u64) -> Result<(), SystemError> {
        self.outputs.ids(request).try_for_each(|id| self.service.cancel(id)).map_err(stopped)
    }

    fn next_event(&mut self, until: Duration) -> Result<Option<TokenEvent>, SystemError> {
        loop {
            if let Some(event) = self.next.take() {
                return Ok(Some(event));
            }
            let Some(timed) = self.service.next_event(self.clock.epoch() + until).map_err(stopped)? else {
                return Ok(None);
            };
            let Some((request, kind)) = self.outputs.translate(timed.event) else { continue };
            if matches!(kind, EventKind::Rejected { .. }) {
                self.cancel(request)?;
            }
            let at = timed.at.saturating_duration_since(self.clock.epoch());
            self.next = self.outputs.take_end().map(|kind| TokenEvent { request, at, kind });
            return Ok(Some(TokenEvent { request, at, kind }));
        }
    }

    fn take_steps(&mut self) -> Vec<StepRecord> {
        self.service.take_steps().iter().map(|step| step_record(step, &self.clock)).collect()
    }
}

fn step_record(step: &StepStats, clock: &WallClock) -> StepRecord {
    let batch = step.batch;
    StepRecord {
        step: step.step,
        start_s: step.started.saturating_duration_since(clock.epoch()).as_secs_f64(),
        schedule_s: step.schedule.as_secs_f64(),
        execute_s: step.execute.as_secs_f64(),
        sample_s: step.sample.as_secs_f64(),
        commit_s: step.commit.as_secs_f64(),
        running: batch.running,
        waiting: batch.waiting,
        prefill_tokens: batch.prefill_tokens,
        decode_tokens: batch.decode_tokens,
        drafted_tokens: batch.drafted_tokens,
        accepted_tokens: batch.accepted_tokens,
        refused_drafts: batch.refused_drafts,
        padding_tokens: batch.padding_tokens,
        preempted: batch.preempted,
        swapped_out: batch.swapped_out,
        swapped_in: batch.swapped_in,
        kv_used: batch.kv.used,
        kv_reserved: batch.kv.reserved,
        kv_internal: batch.kv.internal,
        kv_cached: batch.kv.cached,
        kv_free: batch.kv.free,
        kv_shared: batch.kv.shared,
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use clap::Parser;
    use quire_engine::speculation::{DraftContext, Drafter};

    use super::*;
    use crate::cli::Cli;
    use crate::config::Source;
    use crate::systems::SystemConfig;

    /// Serves the same prompt several times in a cell of its own; prompt tokens that each found in the cache.
    fn cell(settings: &Settings, models: &mut Models, requests: u64) -> Vec<u32> {
        let SystemConfig::Engine(engine) = &settings.systems[0].serve else { panic!("an engine") };
        let Launched { mut system, clock } = engine.launch(settings, models, EngineParts::default()).unwrap();
        let mut found = Vec::new();
        for id in 0..requests {
            let prompt = (100..140).collect();
            let decoding = Decoding::Single {};
            system
                .submit(GenerationRequest {
                    id,
                    prompt,
                    max_tokens: 3,
                    true_output_len: None,
                    class: 0,
                    decoding,
                })
                .unwrap();
            while found.len() as u64 <= id {
                let event = system.next_event(clock.now() + Duration::from_secs(60)).unwrap();
                match event.expect("an answer within a minute").kind {
                    EventKind::Tokens(_) => {}
                    EventKind::Finished { cached_tokens, .. } => found.push(cached_tokens),
                    other => panic!("{other:?}"),
                }
            }
        }
        found
    }

    #[test]
    fn a_cell_finds_nothing_in_the_cache_of_the_one_before() {
        let text =
            std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/fig7.toml"));
        let args = Cli::try_parse_from(["experiment", "fig7.toml", "--quick"]).unwrap().run;
        let mut settings = Settings::resolve(&Source::new("fig7.toml", text.unwrap()), &args).unwrap();
        settings.systems.retain(|system| system.name == "cached");
        let mut models = Models::default();
        // Four blocks of 8 of a prompt of 40: its last token is computed again.
        assert_eq!(cell(&settings, &mut models, 2), [0, 32]);
        assert!(models.executor(&settings).is_ok(), "the weights stay");
        assert_eq!(cell(&settings, &mut models, 2), [0, 32]);
    }

    struct Silent;

    impl Drafter for Silent {
        fn propose(&mut self, _: DraftContext<'_>, _: u32, _: &mut Vec<u32>) {}
    }

    fn system(policy: &str, more: &str) -> EngineSystem {
        let text = format!(
            "scheduler = {{ policy = {{ kind = \"{policy}\" }}, token_budget = 64, max_running = 4 }}\n\
             kv = {{ kind = \"paged\", block_size = 16 }}\n{more}"
        );
        toml::from_str(&text).unwrap()
    }

    #[test]
    fn what_is_given_beside_what_is_configured_is_refused() {
        let policy = || PolicyConfig::default().build().unwrap();
        let given = |policy, drafter| EngineParts { policy, drafter };
        let refused = |system: &EngineSystem, parts| system.check_parts(&parts).unwrap_err();
        let message = refused(&system("continuous", ""), given(Some(policy()), None));
        assert!(message.contains("names another"), "{message}");
        assert_eq!(system("external", "").check_parts(&given(Some(policy()), None)), Ok(()));
        assert_eq!(system("continuous", "").check_parts(&EngineParts::default()), Ok(()));

        let drafting =
            "speculation = { drafter = { kind = \"model\" }, length = { kind = \"fixed\", tokens = 2 } }\n";
        let with_model = system("continuous", &format!("{drafting}draft_model = \"dummy:smollm2-135m\""));
        with_model.check().unwrap();
        let message = refused(&with_model, given(None, Some(Box::new(Silent))));
        assert!(message.contains("`draft_model`"), "{message}");
    }
}
