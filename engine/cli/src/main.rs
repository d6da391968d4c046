//! quire
fn main() {}
