//! Settings in words, for captions and tables.

use quire_workloads::LengthSource;

use super::Settings;
use crate::config::{Arrivals, Device, PanelConfig};
use crate::metrics::Slo;
use crate::systems::{OpenAiSystem, SystemConfig};

impl Settings {
    /// Whether one of the systems that run computes here, with our model and memory, and not a server elsewhere alone.
    pub(crate) fn has_own(&self) -> bool {
        self.servers().count() < self.selected_systems().count()
    }

    fn servers(&self) -> impl Iterator<Item = &OpenAiSystem> {
        self.selected_systems().filter_map(|system| match &system.serve {
            SystemConfig::OpenAi(server) => Some(server),
            _ => None,
        })
    }

    /// Which traces are replayed, and where, for captions.
    pub fn describe_traces(&self) -> Option<String> {
        let traced: Vec<(&PanelConfig, String)> = self.selected_panels().filter_map(replayed).collect();
        let (_, first) = traced.first()?;
        if traced.iter().all(|(_, what)| what == first) && traced.len() == self.selected_panels().count() {
            return Some(format!("Requests have {first}."));
        }
        let panels = traced.iter().map(|(panel, what)| format!("{}: {what}", panel.title));
        Some(format!("{}.", panels.collect::<Vec<_>>().join("; ")))
    }

    /// The model, for captions.
    pub fn describe_model(&self) -> String {
        if !self.has_own() {
            let mut models: Vec<&str> = self.servers().map(|server| &*server.model).collect();
            models.dedup();
            return format!("Model: {}, as a server elsewhere has it", models.join(", "));
        }
        let name = match self.model.strip_prefix("dummy:") {
            Some(shape) => format!("random weights of {shape}'s shape (dummy)"),
            None => self.model.rsplit(['/', '\\']).next().unwrap_or(&self.model).to_string(),
        };
        let divided = match (self.tensor_parallel, self.device) {
            (1, _) => String::new(),
            (ranks, Device::Cpu) => format!(", the engines' in {ranks} ranks"),
            (ranks, Device::Cuda) => format!(", the engines' over {ranks} GPUs (tensor parallel)"),
        };
        format!("Model: {name}, {} weights, {} threads{divided}", self.weights, self.threads)
    }

    /// Memory and scaling, for captions.
    pub fn describe_memory(&self) -> String {
        let mib = self.kv_bytes as f64 / f64::from(1 << 20);
        let mut scale = match self.length_scale {
            1.0 => "lengths as they are".to_string(),
            scale => format!("lengths scaled by {}", fraction(scale)),
        };
        for panel in self.selected_panels() {
            if let Some(own) = panel.length_scale {
                scale.push_str(&format!(" (in {} by {})", panel.name, fraction(self.length_scale * own)));
            }
        }
        let memory = match self.has_own() {
            true => format!("KV memory {mib:.1} MiB ({}), limit", self.kv_dtype.name()),
            false => "Limit".into(),
        };
        format!("{memory} {} tokens, {scale}", self.max_model_len)
    }

    /// The limits of goodput, for captions.
    pub fn describe_slo(&self) -> String {
        let Slo { ttft_s, tpot_s } = self.slo;
        format!("Goodput counts requests with TTFT up to {ttft_s} s and TPOT up to {} ms.", tpot_s * 1e3)
    }
}

/// What of a panel's requests is a trace's, where any is.
fn replayed(panel: &PanelConfig) -> Option<(&PanelConfig, String)> {
    let LengthSource::Trace(trace) = &panel.lengths else { return None };
    let name = trace.path.file_stem().map_or_else(|| "?".into(), |name| name.to_string_lossy().into_owned());
    let what = match panel.arrivals {
        Arrivals::Trace {} => "lengths and, but for the rate, arrival times",
        _ => "lengths",
    };
    let of = match trace.one_in {
        1 => String::new(),
        one_in => format!("one conversation in {one_in} of "),
    };
    Some((panel, format!("{what} of {of}the trace {name}")))
}

/// `1/16` for 0.0625, the number itself where it is no such fraction.
fn fraction(value: f64) -> String {
    let inverse = 1.0 / value;
    if (inverse - inverse.round()).abs() < 1e-9 && inverse > 1.0 {
        format!("1/{inverse:.0}")
    } else {
        value.to_string()
    }
}
