//! A criterion measurement that also says what share of a ceiling it reached.

use std::cell::Cell;
use std::time::{Duration, Instant};

use criterion::{BenchmarkGroup, Criterion, measurement::WallTime};

/// A group with short measurements: there are many.
pub(crate) fn group<'a>(criterion: &'a mut Criterion, name: &str) -> BenchmarkGroup<'a, WallTime> {
    let mut group = criterion.benchmark_group(name);
    group
        .sample_size(10)
        .warm_up_time(Duration::from_millis(100))
        .measurement_time(Duration::from_millis(300));
    group
}

/// What an iteration does, in units of `name`, and the most of them a second.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Work {
    pub(crate) amount: f64,
    pub(crate) name: &'static str,
    pub(crate) ceiling: f64,
}

/// Measures `body` and prints the rate of its fastest sample.
pub(crate) fn bench(group: &mut BenchmarkGroup<'_, WallTime>, id: &str, work: Work, mut body: impl FnMut()) {
    let best = Cell::new(f64::INFINITY);
    group.bench_function(id, |bencher| {
        bencher.iter_custom(|iterations| {
            let start = Instant::now();
            for _ in 0..iterations {
                body();
            }
            let elapsed = start.elapsed();
            best.set(best.get().min(elapsed.as_secs_f64() / iterations as f64));
            elapsed
        });
    });
    if best.get().is_finite() {
        let rate = work.amount / best.get() / 1e9;
        let share = 100.0 * rate / work.ceiling;
        println!(
            "    {id}: {:.1} us, {rate:.1} {}, {share:.0} % of the ceiling",
            best.get() * 1e6,
            work.name
        );
    }
}
