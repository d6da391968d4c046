//! Matrix products.

#[path = "common/ceiling.rs"]
mod ceiling;

use quire_kernels::cpu::ThreadPool;

fn main() {
    let pool = ThreadPool::new(ThreadPool::default_threads());
    println!("{}", ceiling::Ceiling::measure(&pool));
}
