//! What a person sees while an experiment runs.

use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use quire_workloads::Progress;

use crate::record::{CellEntry, CellKey, CellStatus};
use crate::systems::StartListener;

/// Bars on a terminal: all cells with the time left, and the cell under way. Elsewhere a line a cell.
pub(crate) struct Display {
    bars: MultiProgress,
    all: ProgressBar,
    cell: ProgressBar,
    visible: bool,
    started: Instant,
    /// Seconds that cells were expected to take: all, and those that are over.
    expected: f64,
    over: f64,
    /// Seconds that the cells that ran took, and were expected to take.
    took: f64,
    took_expected: f64,
    cells: usize,
    done: usize,
}

impl Display {
    /// For `cells` cells that are expected to take `expected_s` seconds.
    pub(crate) fn new(cells: usize, expected_s: f64, quiet: bool) -> Self {
        let bars = MultiProgress::new();
        let style = |template: &str| {
            ProgressStyle::with_template(template).expect("the templates are valid").progress_chars("=> ")
        };
        let all = bars.add(ProgressBar::new(cells as u64));
        all.set_style(style("{bar:32} {pos}/{len} cells, {elapsed} so far, {msg}"));
        let cell = bars.add(ProgressBar::new(1));
        cell.set_style(style("{bar:32} {msg}"));
        if quiet {
            bars.set_draw_target(indicatif::ProgressDrawTarget::hidden());
        }
        let visible = !quiet && !all.is_hidden();
        let started = Instant::now();
        let mut display = Self {
            bars,
            all,
            cell,
            visible,
            started,
            expected: expected_s,
            over: 0.0,
            took: 0.0,
            took_expected: 0.0,
            cells,
            done: 0,
        };
        display.show_left();
        if quiet {
            display.visible = true;
        }
        display
    }

    fn show_left(&self) {
        // Expectations, corrected by how the cells so far kept to theirs.
        let pace = if self.took_expected > 0.0 { self.took / self.took_expected } else { 1.0 };
        let left = ((self.expected - self.over) * pace).max(0.0);
        self.all.set_message(format!("about {} left", human(left)));
    }

    /// A cell begins.
    pub(crate) fn begin(&self, key: &CellKey, requests: u64) {
        self.cell.set_length(requests);
        self.cell.set_position(0);
        self.cell.set_message(format!("{key}: starting"));
    }

    /// What a system of this cell is doing while it starts; a model takes seconds to load, a GPU's graphs to be captured.
    pub(crate) fn starting(&self, key: &CellKey) -> StartListener {
        let (bar, key) = (self.cell.clone(), key.to_string());
        StartListener::new(move |what, done, all| bar.set_message(format!("{key}: {what}, {done} of {all}")))
    }

    /// A cell goes on.
    pub(crate) fn update(&self, key: &CellKey, progress: Progress) {
        self.cell.set_position(progress.ended as u64);
        let Progress { sent, ended, total, now_s, started_s } = progress;
        let seconds = now_s - started_s;
        let rest = (total.saturating_sub(sent)) as f64 / key.rate;
        let left = if rest > 0.0 { format!("arrivals for {rest:.0} s more") } else { "draining".into() };
        self.cell
            .set_message(format!("{key}: {sent} sent, {ended} ended of {total}; {seconds:.0} s, {left}"));
    }

    /// A cell is over, with what its system did not serve; it `took` time if it was not left out.
    pub(crate) fn end(&mut self, entry: &CellEntry, losses: &str, expected_s: f64, took: Option<Duration>) {
        self.done += 1;
        self.over += expected_s;
        if let Some(took) = took {
            self.took += took.as_secs_f64();
            self.took_expected += expected_s;
        }
        self.all.inc(1);
        self.show_left();
        let what = match &entry.status {
            CellStatus::Done {} if entry.overloaded => "overloaded".to_string(),
            CellStatus::Done {} => "done".into(),
            CellStatus::Void { reason } => format!("VOID: {reason}"),
            CellStatus::Skipped { saturated_at } => format!("left out: overloaded at {saturated_at}"),
        };
        let what = if losses.is_empty() { what } else { format!("{what}, {losses}") };
        let seconds = took.map_or(String::new(), |t| format!(", {:.1} s", t.as_secs_f64()));
        let important = matches!(entry.status, CellStatus::Void { .. }) || !losses.is_empty();
        if !self.visible {
            eprintln!("[{}/{}] {}: {what}{seconds}", self.done, self.cells, entry.key);
        } else if important {
            // On a terminal the bars say the rest.
            let _ = self.bars.println(format!("{}: {what}", entry.key));
        }
    }

    /// All is over.
    pub(crate) fn finish(&self) -> Duration {
        self.cell.finish_and_clear();
        self.all.finish_and_clear();
        self.started.elapsed()
    }
}

/// Seconds, minutes or hours.
pub(crate) fn human(seconds: f64) -> String {
    if seconds < 100.0 {
        format!("{seconds:.0} s")
    } else if seconds < 100.0 * 60.0 {
        format!("{:.0} min", seconds / 60.0)
    } else {
        format!("{:.1} h", seconds / 3600.0)
    }
}
