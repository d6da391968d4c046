//! The numbers of a micro-benchmark: every line at every size, and the ratios between lines.

use std::collections::BTreeMap;

use anyhow::{Result, anyhow};
use serde::Serialize;

use super::{ClaimNumbers, Number};
use crate::config::Device;
use crate::metrics::Known;
use crate::micro::{MicroRecord, judge};
use crate::stats::{Estimate, RatioEstimate};

/// A micro-benchmark for a document.
#[derive(Debug, Serialize)]
pub(super) struct MicroNumbers {
    started: String,
    commit: String,
    dirty: bool,
    machine: String,
    device: Device,
    seeds: u32,
    caption: Vec<String>,
    panels: Vec<PanelNumbers>,
    claims: Vec<ClaimNumbers>,
}

#[derive(Debug, Serialize)]
struct PanelNumbers {
    name: String,
    label: String,
    lines: Vec<LineNumbers>,
}

#[derive(Debug, Serialize)]
struct LineNumbers {
    name: String,
    label: String,
    at: Vec<PointNumbers>,
}

#[derive(Debug, Serialize)]
struct PointNumbers {
    x: u32,
    seconds: Option<Number>,
    /// The same over another line's, paired by repeat.
    over: BTreeMap<String, Number>,
}

impl MicroNumbers {
    pub(super) fn new(record: &MicroRecord, caption: Vec<String>) -> Result<Self> {
        let judged = judge(record).map_err(|error| anyhow!("its claims cannot be read: {error}"))?;
        let plan = &record.plan;
        let line = |panel: &str, name: &str, label: &str| LineNumbers {
            name: name.into(),
            label: label.into(),
            at: plan.xs.iter().map(|&x| point(record, panel, name, x)).collect(),
        };
        let panels = plan.panels.iter().map(|panel| PanelNumbers {
            name: panel.name.clone(),
            label: panel.label.clone(),
            lines: plan.lines.iter().map(|of| line(&panel.name, &of.name, &of.label)).collect(),
        });
        Ok(Self {
            started: record.started.clone(),
            commit: record.revision.commit.clone(),
            dirty: record.revision.dirty,
            machine: record.machine.describe(),
            device: record.device,
            seeds: record.run.repeats,
            caption,
            panels: panels.collect(),
            claims: judged.iter().map(ClaimNumbers::from).collect(),
        })
    }
}

fn point(record: &MicroRecord, panel: &str, line: &str, x: u32) -> PointNumbers {
    let others = record.plan.lines.iter().filter(|other| other.name != line);
    let over = others.filter_map(|other| {
        let ratio = record.ratio(panel, [line, &other.name], x)?;
        Some((other.name.clone(), of_ratio(ratio)))
    });
    PointNumbers { x, seconds: record.estimate(panel, line, x).map(of_time), over: over.collect() }
}

fn of_time(of: Estimate) -> Number {
    Number { value: of.mean, interval: of.interval(), seeds: of.seeds, known: Known::Exactly.name() }
}

fn of_ratio(of: RatioEstimate) -> Number {
    Number { value: of.ratio, interval: of.interval, seeds: of.seeds, known: Known::Exactly.name() }
}
