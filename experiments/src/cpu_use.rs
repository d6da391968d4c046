//! Who used the CPU while a cell ran: on a machine that does something else too, times are not the system's alone.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

/// Share of the machine's CPU time, used by others, above which a cell's times are in doubt.
pub const BUSY_SHARE: f64 = 0.1;

/// Shorter cells are not measured: the system counts in hundredths of a second.
const SHORTEST: Duration = Duration::from_secs(1);

/// Ticks in a second, as Linux reports CPU time to programs on all of its architectures.
const TICKS: f64 = 100.0;

/// Use of the CPU over a cell.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CpuUse {
    /// CPU seconds a second that this program and its children used.
    pub own: f64,
    /// Share of all the machine's CPU time that others used; none where the system under test may be one of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub others: Option<f64>,
}

/// The beginning of a stretch whose use is to be told.
#[derive(Debug)]
pub(crate) struct CpuWatch {
    at: Instant,
    begun: Ticks,
}

/// Ticks so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Ticks {
    own: u64,
    busy: u64,
    all: u64,
}

impl CpuWatch {
    /// Begins; none where the system does not tell.
    pub(crate) fn start() -> Option<Self> {
        Some(Self { at: Instant::now(), begun: Ticks::now()? })
    }

    /// Ends; with `elsewhere`, the system under test is a program that was not started here.
    pub(crate) fn stop(self, elsewhere: bool) -> Option<CpuUse> {
        let lasted = self.at.elapsed();
        if lasted < SHORTEST {
            return None;
        }
        between(self.begun, Ticks::now()?, lasted.as_secs_f64(), elsewhere)
    }
}

fn between(begun: Ticks, ended: Ticks, seconds: f64, elsewhere: bool) -> Option<CpuUse> {
    // A child that was started and not waited for takes its time along.
    let own = ended.own.saturating_sub(begun.own) as f64;
    let busy = ended.busy.checked_sub(begun.busy)? as f64;
    let all = ended.all.checked_sub(begun.all).filter(|all| *all > 0)? as f64;
    let others = (!elsewhere).then(|| ((busy - own).max(0.0) / all).min(1.0));
    Some(CpuUse { own: own / TICKS / seconds, others })
}

impl Ticks {
    fn now() -> Option<Self> {
        let (busy, all) = machine(&fs::read_to_string("/proc/stat").ok()?)?;
        Some(Self { own: own()?, busy, all })
    }
}

/// Busy ticks and all ticks in the text of /proc/stat. Time that a hypervisor took counts as busy: others have it.
fn machine(text: &str) -> Option<(u64, u64)> {
    let line = text.lines().next()?.strip_prefix("cpu ")?;
    let ticks: Vec<u64> = line.split_whitespace().map_while(|number| number.parse().ok()).collect();
    // user nice system idle iowait irq softirq steal; what guests used is in user already.
    let all = ticks.get(..8)?.iter().sum::<u64>();
    Some((all - ticks[3] - ticks[4], all))
}

/// Ticks of this process, of the children that it waited for, and of those that run.
fn own() -> Option<u64> {
    let this = std::process::id();
    let mut processes: HashMap<u32, Process> = HashMap::new();
    for entry in fs::read_dir("/proc").ok()?.filter_map(Result::ok) {
        let Some(id) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        // It may have ended meanwhile.
        let stat = fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        processes.extend(process(&stat).map(|found| (id, found)));
    }
    let mut ours = HashSet::from([this]);
    // Children of children, however deep.
    while let Some(id) =
        processes.iter().find(|(id, p)| !ours.contains(id) && ours.contains(&p.parent)).map(|(id, _)| *id)
    {
        ours.insert(id);
    }
    processes
        .contains_key(&this)
        .then(|| ours.iter().filter_map(|id| processes.get(id)).map(|p| p.ticks).sum())
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Process {
    parent: u32,
    ticks: u64,
}

/// Parent and ticks in the text of /proc/PID/stat. The name before them is in parentheses and may have any.
fn process(text: &str) -> Option<Process> {
    let after_name = &text[text.rfind(')')? + 1..];
    let fields: Vec<&str> = after_name.split_whitespace().collect();
    // Fields 4 and 14 to 17 of proc(5), of which the state, field 3, is the first here.
    let parent = fields.get(1)?.parse().ok()?;
    let ticks = fields.get(11..15)?.iter().map(|field| field.parse::<u64>().ok()).sum::<Option<u64>>()?;
    Some(Process { parent, ticks })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_files_are_read() {
        let stat = "cpu  100 10 50 800 40 5 5 20 7 0\ncpu0 1 1\n";
        assert_eq!(machine(stat), Some((190, 1030)));
        assert_eq!(machine("cpu  100 10"), None);
        let text = "42 (a (strange) name) S 7 42 42 0 -1 4194560 1 2 3 4 30 12 5 3 20 0 1 0 99";
        assert_eq!(process(text), Some(Process { parent: 7, ticks: 50 }));
        assert_eq!(process("42 (name"), None);
    }

    #[test]
    fn what_is_not_ours_is_others() {
        let begun = Ticks { own: 100, busy: 1000, all: 10_000 };
        let ended = Ticks { own: 300, busy: 1400, all: 11_000 };
        // 2 s of our own and 2 of others, of 10 on all cores.
        let found = between(begun, ended, 5.0, false).unwrap();
        assert_eq!((found.own, found.others), (0.4, Some(0.2)));
        assert_eq!(between(begun, ended, 5.0, true).unwrap().others, None);
        assert_eq!(between(begun, begun, 5.0, false), None, "no time went by");
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn this_process_is_found() {
        let watch = CpuWatch::start().unwrap();
        assert!(watch.begun.own <= watch.begun.busy && watch.begun.busy < watch.begun.all, "{watch:?}");
        assert_eq!(watch.stop(false), None, "too short to be measured");
    }
}
