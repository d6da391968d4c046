//! A run as a trace for Perfetto or chrome://tracing: each cell a process, steps as slices with their phases, requests
//! as asynchronous slices from intended arrival to end.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use quire_workloads::StepRecord;
use serde_json::{Value, json};

use crate::record::{CellStatus, RequestRow};
use crate::store::{StoreError, Stored};

/// Microseconds between two cells on the common time line.
const GAP_US: f64 = 1e6;

/// Writes the trace of a stored run to `path`.
///
/// # Errors
/// When the file cannot be written.
pub fn write_trace(run: &Stored, path: &Path) -> Result<(), StoreError> {
    let io = |e| StoreError::io(path, e);
    let mut out = Events { file: BufWriter::new(File::create(path).map_err(io)?), first: true };
    out.begin().map_err(io)?;
    let mut offset = 0.0;
    let done = run.cells.iter().filter(|c| c.status == CellStatus::Done {});
    for (process, cell) in done.enumerate() {
        let id = cell.key.id();
        let at = Cell { process, offset };
        let name = json!({ "name": cell.key.to_string() });
        out.add(json!({ "ph": "M", "name": "process_name", "pid": process, "args": name })).map_err(io)?;
        let name = json!({ "name": "engine steps" });
        out.add(json!({ "ph": "M", "name": "thread_name", "pid": process, "tid": 0, "args": name }))
            .map_err(io)?;
        for step in run.steps.get(&id).into_iter().flatten() {
            at.step(step).into_iter().try_for_each(|e| out.add(e)).map_err(io)?;
        }
        for row in run.requests.iter().filter(|r| r.key == cell.key) {
            at.request(row, cell.end_s).into_iter().try_for_each(|e| out.add(e)).map_err(io)?;
        }
        offset += cell.end_s * 1e6 + GAP_US;
    }
    out.end().map_err(io)
}

/// A cell's place in the trace.
struct Cell {
    process: usize,
    offset: f64,
}

impl Cell {
    fn micros(&self, seconds: f64) -> f64 {
        self.offset + seconds * 1e6
    }

    fn slice(&self, name: &str, start_s: f64, seconds: f64, args: Value) -> Value {
        json!({ "ph": "X", "name": name, "cat": "step", "pid": self.process, "tid": 0,
            "ts": self.micros(start_s), "dur": seconds * 1e6, "args": args })
    }

    /// The step, its phases inside it, and counters of what it held.
    fn step(&self, step: &StepRecord) -> Vec<Value> {
        let phases = [
            ("schedule", step.schedule_s),
            ("execute", step.execute_s),
            ("sample", step.sample_s),
            ("commit", step.commit_s),
        ];
        let whole = phases.iter().map(|p| p.1).sum();
        let args = serde_json::to_value(step).unwrap_or_default();
        let mut events = vec![self.slice(&format!("step {}", step.step), step.start_s, whole, args)];
        let mut start = step.start_s;
        for (name, seconds) in phases {
            events.push(self.slice(name, start, seconds, json!({})));
            start += seconds;
        }
        let counters = [
            ("sequences", json!({ "running": step.running, "waiting": step.waiting })),
            (
                "KV slots",
                json!({ "used": step.kv_used, "reserved": step.kv_reserved,
                "internal": step.kv_internal, "cached": step.kv_cached }),
            ),
        ];
        events.extend(counters.map(|(name, args)| {
            json!({ "ph": "C", "name": name, "pid": self.process, "ts": self.micros(step.start_s), "args": args })
        }));
        events
    }

    /// The request from intended arrival to end, and its wait for the first token inside.
    fn request(&self, row: &RequestRow, cell_end_s: f64) -> Vec<Value> {
        let seen = row.observed(cell_end_s);
        let name = format!("request {}", row.request());
        let event = |ph: &str, name: &str, at_s: f64, args: Value| {
            json!({ "ph": ph, "name": name, "cat": "request", "pid": self.process, "tid": 1,
                "id": row.request().to_string(), "ts": self.micros(at_s), "args": args })
        };
        let args = json!({ "prompt_tokens": row.record.prompt_tokens, "output_tokens": seen.tokens(),
            "ending": format!("{:?}", seen.ending) });
        let mut events = vec![event("b", &name, seen.intended_s, args)];
        if let Some(first) = seen.emissions.first() {
            events.push(event("b", "until first token", seen.intended_s, json!({})));
            events.push(event("e", "until first token", first.at_s, json!({})));
        }
        events.push(event("e", &name, seen.end_s, json!({})));
        events
    }
}

/// The events of a trace file, written one by one.
struct Events<W: Write> {
    file: W,
    first: bool,
}

impl<W: Write> Events<W> {
    fn begin(&mut self) -> std::io::Result<()> {
        write!(self.file, "{{\"displayTimeUnit\":\"ms\",\"traceEvents\":[")
    }

    fn add(&mut self, event: Value) -> std::io::Result<()> {
        let comma = if std::mem::take(&mut self.first) { "" } else { "," };
        write!(self.file, "{comma}\n{event}")
    }

    fn end(&mut self) -> std::io::Result<()> {
        writeln!(self.file, "\n]}}")?;
        self.file.flush()
    }
}
