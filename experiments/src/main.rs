//! experiment
fn main() {}
