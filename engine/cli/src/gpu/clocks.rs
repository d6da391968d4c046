//! A GPU's clocks and power while something is measured, by the vendor's own `nvidia-smi`.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::Serialize;

/// Between readings, in milliseconds.
const EVERY_MS: u32 = 50;
/// Readings kept: half an hour.
const MOST: usize = 36_000;

/// Means over the readings of a stretch of time.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(crate) struct Clocks {
    /// Of the multiprocessors, in MHz.
    pub(crate) sm_mhz: f64,
    /// The lowest reading of it.
    pub(crate) lowest_sm_mhz: f64,
    /// Of the memory, in MHz.
    memory_mhz: f64,
    /// Power drawn, in watts.
    pub(crate) watts: f64,
    readings: usize,
}

#[derive(Debug, Clone, Copy)]
struct Reading {
    at: Instant,
    sm_mhz: f64,
    memory_mhz: f64,
    watts: f64,
}

/// Reads until it is dropped.
#[derive(Debug)]
pub(crate) struct Sampler {
    child: Child,
    readings: Arc<Mutex<Vec<Reading>>>,
}

impl Sampler {
    /// Starts to read; none where there is no `nvidia-smi` that knows this GPU.
    pub(crate) fn start(uuid: &str) -> Option<Self> {
        let mut child = Command::new("nvidia-smi")
            .arg(format!("--id={uuid}"))
            .arg(format!("--loop-ms={EVERY_MS}"))
            .args(["--query-gpu=clocks.sm,clocks.mem,power.draw.instant", "--format=csv,noheader,nounits"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .ok()?;
        let lines = BufReader::new(child.stdout.take()?).lines();
        let readings = Arc::new(Mutex::new(Vec::new()));
        let kept = Arc::clone(&readings);
        // It ends with the child's output.
        std::thread::spawn(move || {
            for line in lines.map_while(Result::ok).take(MOST) {
                let Some([sm_mhz, memory_mhz, watts]) = numbers(&line) else { continue };
                let reading = Reading { at: Instant::now(), sm_mhz, memory_mhz, watts };
                kept.lock().unwrap_or_else(PoisonError::into_inner).push(reading);
            }
        });
        Some(Self { child, readings })
    }

    /// What was read since `begin`, if anything was.
    pub(crate) fn since(&self, begin: Instant) -> Option<Clocks> {
        let readings = self.readings.lock().unwrap_or_else(PoisonError::into_inner);
        // A reading takes a while to get here.
        let begin = begin + Duration::from_millis(EVERY_MS.into());
        means(readings.iter().filter(|reading| reading.at >= begin))
    }
}

impl Drop for Sampler {
    fn drop(&mut self) {
        // That it has ended already is no error.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn numbers(line: &str) -> Option<[f64; 3]> {
    let numbers: Vec<f64> = line.split(',').map_while(|field| field.trim().parse().ok()).collect();
    numbers.try_into().ok()
}

fn means<'a>(readings: impl Iterator<Item = &'a Reading> + Clone) -> Option<Clocks> {
    let count = readings.clone().count();
    let mean = |value: fn(&Reading) -> f64| readings.clone().map(value).sum::<f64>() / count as f64;
    (count > 0).then(|| Clocks {
        sm_mhz: mean(|reading| reading.sm_mhz),
        lowest_sm_mhz: readings.clone().map(|reading| reading.sm_mhz).fold(f64::INFINITY, f64::min),
        memory_mhz: mean(|reading| reading.memory_mhz),
        watts: mean(|reading| reading.watts),
        readings: count,
    })
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::{Clocks, Reading, means, numbers};

    #[test]
    fn lines_are_three_numbers() {
        assert_eq!(numbers("1980, 2619, 123.45"), Some([1980.0, 2619.0, 123.45]));
        for wrong in ["", "1980, 2619", "[N/A], 2619, 5", "1, 2, 3, 4", "1980 MHz, 2619 MHz, 5 W"] {
            assert_eq!(numbers(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn means_and_the_lowest() {
        let at = Instant::now();
        let readings = [(1980.0, 500.0), (1740.0, 700.0)].map(|(sm_mhz, watts)| Reading {
            at,
            sm_mhz,
            memory_mhz: 2619.0,
            watts,
        });
        let expected =
            Clocks { sm_mhz: 1860.0, lowest_sm_mhz: 1740.0, memory_mhz: 2619.0, watts: 600.0, readings: 2 };
        assert_eq!(means(readings.iter()), Some(expected));
        assert_eq!(means([].iter()), None);
    }
}
