//! The engine's core over a fake executor: KV books, scheduler, policies, loop and thread.

mod beams;
mod config;
mod dice;
mod edges;
mod fake;
mod fork;
mod kv;
mod overlap;
mod plans;
mod prefill_first;
mod prefix;
mod priority;
mod properties;
mod random_policy;
mod service;
mod speculation;
mod swap;
