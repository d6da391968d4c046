//! A GPU's clocks and power while something is measured, by the vendor's own `nvidia-smi`. Needs no CUDA.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader};
use std::ops::Range;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::Serialize;

/// Readings kept, the latest: half an hour at one every 50 ms.
const MOST: usize = 36_000;

/// What was read over a stretch of time.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Clocks {
    /// Mean clock of the multiprocessors, in MHz.
    pub sm_mhz: f64,
    /// The lowest reading of it.
    pub lowest_sm_mhz: f64,
    /// Mean clock of the memory, in MHz.
    pub memory_mhz: f64,
    /// Mean power drawn, in watts.
    pub watts: f64,
    /// The highest reading of it.
    pub highest_watts: f64,
    /// How many readings there were.
    pub readings: usize,
}

#[derive(Debug, Clone, Copy)]
struct Reading {
    at: Instant,
    sm_mhz: f64,
    memory_mhz: f64,
    watts: f64,
}

/// Reads a GPU's clocks until it is dropped.
#[derive(Debug)]
pub struct ClockSampler {
    child: Child,
    every: Duration,
    readings: Arc<Mutex<VecDeque<Reading>>>,
}

impl ClockSampler {
    /// Starts to read the GPU that the vendor's tools know by `uuid`, once in `every` (whole milliseconds, at least one);
    /// none where there is no `nvidia-smi`. One that does not know this GPU reads nothing.
    pub fn start(uuid: &str, every: Duration) -> Option<Self> {
        let mut command = Command::new("nvidia-smi");
        command
            .arg(format!("--id={uuid}"))
            .arg(format!("--loop-ms={}", every.as_millis().max(1)))
            .args(["--query-gpu=clocks.sm,clocks.mem,power.draw.instant", "--format=csv,noheader,nounits"]);
        Self::read(command, every)
    }

    /// Keeps what `command` prints, a reading a line.
    fn read(mut command: Command, every: Duration) -> Option<Self> {
        let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().ok()?;
        let mut sampler = Self { child, every, readings: Arc::default() };
        let lines = BufReader::new(sampler.child.stdout.take()?).lines();
        let kept = Arc::downgrade(&sampler.readings);
        let thread = std::thread::Builder::new().name("gpu-clocks".into()).spawn(move || {
            // It ends with the child's output, or with the sampler where something else holds that open.
            for line in lines.map_while(Result::ok) {
                let Some(readings) = kept.upgrade() else { break };
                if let Some([sm_mhz, memory_mhz, watts]) = numbers(&line) {
                    let reading = Reading { at: Instant::now(), sm_mhz, memory_mhz, watts };
                    push(&mut readings.lock().unwrap_or_else(PoisonError::into_inner), reading);
                }
            }
        });
        thread.is_ok().then_some(sampler)
    }

    /// What was read since `begin`, if anything was.
    pub fn since(&self, begin: Instant) -> Option<Clocks> {
        self.over(&[begin..Instant::now()])
    }

    /// What was read in these stretches of time taken together, if anything was. Only the latest 36,000 readings are kept.
    pub fn over(&self, spans: &[Range<Instant>]) -> Option<Clocks> {
        let readings = self.readings.lock().unwrap_or_else(PoisonError::into_inner);
        summarize(readings.iter().filter(|reading| is_of(spans, self.every, reading.at)))
    }
}

impl Drop for ClockSampler {
    fn drop(&mut self) {
        // That it has ended already is no error.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Whether what is read at `at` is of one of these stretches of time. A reading takes a while to get here: the first of a
/// stretch may be of before.
fn is_of(spans: &[Range<Instant>], every: Duration, at: Instant) -> bool {
    spans.iter().any(|span| span.start + every <= at && at < span.end)
}

/// Keeps a reading, and lets the oldest go where there are too many.
fn push(readings: &mut VecDeque<Reading>, reading: Reading) {
    if readings.len() >= MOST {
        readings.pop_front();
    }
    readings.push_back(reading);
}

fn numbers(line: &str) -> Option<[f64; 3]> {
    let numbers: Vec<f64> = line.split(',').map_while(|field| field.trim().parse().ok()).collect();
    numbers.try_into().ok()
}

fn summarize<'a>(readings: impl Iterator<Item = &'a Reading> + Clone) -> Option<Clocks> {
    let count = readings.clone().count();
    let mean = |value: fn(&Reading) -> f64| readings.clone().map(value).sum::<f64>() / count as f64;
    (count > 0).then(|| Clocks {
        sm_mhz: mean(|reading| reading.sm_mhz),
        lowest_sm_mhz: readings.clone().map(|reading| reading.sm_mhz).fold(f64::INFINITY, f64::min),
        memory_mhz: mean(|reading| reading.memory_mhz),
        watts: mean(|reading| reading.watts),
        highest_watts: readings.clone().map(|reading| reading.watts).fold(0.0, f64::max),
        readings: count,
    })
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;
    use std::time::{Duration, Instant};

    use super::{Clocks, MOST, Reading, is_of, numbers, push, summarize};

    #[test]
    fn lines_are_three_numbers() {
        assert_eq!(numbers("1980, 2619, 123.45"), Some([1980.0, 2619.0, 123.45]));
        for wrong in ["", "1980, 2619", "[N/A], 2619, 5", "1, 2, 3, 4", "1980 MHz, 2619 MHz, 5 W"] {
            assert_eq!(numbers(wrong), None, "{wrong}");
        }
    }

    fn reading(at: Instant, sm_mhz: f64, watts: f64) -> Reading {
        Reading { at, sm_mhz, memory_mhz: 2619.0, watts }
    }

    #[test]
    fn means_the_lowest_and_the_highest() {
        let at = Instant::now();
        let readings = [reading(at, 1980.0, 500.0), reading(at, 1740.0, 700.0)];
        let expected = Clocks {
            sm_mhz: 1860.0,
            lowest_sm_mhz: 1740.0,
            memory_mhz: 2619.0,
            watts: 600.0,
            highest_watts: 700.0,
            readings: 2,
        };
        assert_eq!(summarize(readings.iter()), Some(expected));
        assert_eq!(summarize([].iter()), None);
    }

    #[test]
    fn stretches_of_time_have_their_own_readings() {
        let (start, ms) = (Instant::now(), Duration::from_millis);
        let at = |millis: u64| start + ms(millis);
        let spans = [at(0)..at(200), at(500)..at(700)];
        let found: Vec<u64> = (0..900).step_by(50).filter(|&t| is_of(&spans, ms(50), at(t))).collect();
        assert_eq!(found, [50, 100, 150, 550, 600, 650]);
        assert!(!is_of(&[], ms(50), at(50)));
    }

    #[test]
    fn the_latest_readings_are_kept() {
        let (mut readings, at) = (VecDeque::new(), Instant::now());
        for mhz in 0..MOST + 2 {
            push(&mut readings, reading(at, mhz as f64, 1.0));
        }
        assert_eq!(readings.len(), MOST);
        assert_eq!((readings[0].sm_mhz, readings[MOST - 1].sm_mhz), (2.0, (MOST + 1) as f64));
    }

    /// A program that prints lines as `nvidia-smi` does, and others.
    #[cfg(unix)]
    #[test]
    fn a_programs_lines_are_read_until_the_sampler_goes() {
        use std::process::Command;
        use std::sync::Arc;

        use super::ClockSampler;

        let every = Duration::from_millis(1);
        let script = "while :; do echo '1980, 2619, 500'; echo 'no reading'; sleep 0.01; done";
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        let begin = Instant::now();
        let sampler = ClockSampler::read(command, every).unwrap();
        while sampler.since(begin).is_none_or(|clocks| clocks.readings < 3) {
            assert!(begin.elapsed() < Duration::from_secs(60), "no readings");
            std::thread::sleep(every);
        }
        let clocks = sampler.since(begin).unwrap();
        assert_eq!((clocks.sm_mhz, clocks.lowest_sm_mhz, clocks.highest_watts), (1980.0, 1980.0, 500.0));
        assert_eq!(sampler.over(&[]), None);

        // The thread lets go of the readings when it ends.
        let readings = Arc::clone(&sampler.readings);
        assert_eq!(Arc::weak_count(&readings), 1);
        drop(sampler);
        let dropped = Instant::now();
        while Arc::weak_count(&readings) > 0 {
            assert!(dropped.elapsed() < Duration::from_secs(60), "the thread goes on");
            std::thread::sleep(every);
        }
    }

    #[cfg(unix)]
    #[test]
    fn a_program_that_is_missing_or_says_nothing_is_no_failure() {
        use std::process::Command;

        use super::ClockSampler;

        let every = Duration::from_millis(1);
        assert!(ClockSampler::read(Command::new("no-such-program-anywhere"), every).is_none());
        let begin = Instant::now();
        let silent = ClockSampler::read(Command::new("true"), every).unwrap();
        assert_eq!(silent.since(begin), None);
    }
}
