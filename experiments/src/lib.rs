//! Experiments: systems under test, the runner, records, metrics, figures and comparisons.
//!
//! A configuration ([`config`]) with the command line ([`cli`]) gives [`Settings`]; an [`Experiment`] runs them and
//! leaves a folder of records; [`RunData`] reads a folder and computes every figure from its records; [`plot`],
//! [`table`], [`summary`] and [`compare`] show them, [`claims`] holds them against what papers found,
//! and [`numbers`] writes what a document reads. Where a figure
//! is of traces, nothing runs: see [`traces`]; where it is of one operation, nothing is served: see [`micro`]. A program of
//! one's own can add systems: see
//! [`Experiment::external`] and [`commands::run_with`].

mod cell;
pub mod claims;
pub mod cli;
pub mod commands;
pub mod compare;
pub mod config;
pub mod cpu_use;
mod experiment;
mod frame;
pub mod gpu_use;
pub mod machine;
pub mod manifest;
pub mod metrics;
pub mod micro;
mod names;
pub mod numbers;
pub mod plot;
mod progress;
pub mod ratios;
pub mod record;
mod record_file;
mod replace;
mod run_data;
pub mod settings;
pub mod stats;
pub mod store;
pub mod suite;
pub mod summary;
pub mod systems;
pub mod table;
mod text_table;
pub mod trace_events;
pub mod traces;

pub use experiment::{Experiment, ExperimentError, Target};
pub use frame::FrameError;
pub use run_data::{CAPACITY_FACTOR, CellData, Disagreement, Group, RunData};
pub use settings::Settings;
