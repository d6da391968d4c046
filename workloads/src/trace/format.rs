//! Telling trace formats apart.

use std::io::BufRead;

use serde::{Deserialize, Serialize};

use super::{LogFilter, ReadOptions, Trace, Turns, azure, burst_gpt, mooncake, share_gpt};
use crate::error::WorkloadError;

/// A trace's file format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TraceFormat {
    /// Azure LLM inference traces 2023 and 2024: CSV with wall-clock times.
    Azure,
    /// BurstGPT: CSV with times in seconds.
    BurstGpt,
    /// Mooncake: JSON lines with times in milliseconds and ids of prompt blocks.
    Mooncake,
    /// ShareGPT: a JSON array of conversations, without times.
    ShareGpt,
}

impl TraceFormat {
    /// Its name in configurations.
    fn name(self) -> &'static str {
        match self {
            Self::Azure => "azure",
            Self::BurstGpt => "burst_gpt",
            Self::Mooncake => "mooncake",
            Self::ShareGpt => "share_gpt",
        }
    }

    /// Refuses options that are for another format: this one's reader would not look at them.
    fn check(self, options: &ReadOptions, file: &str) -> Result<(), WorkloadError> {
        let given = [
            ("log", options.log != LogFilter::default(), Self::BurstGpt),
            ("turns", options.turns != Turns::default(), Self::ShareGpt),
            ("chars_per_token", !options.tokens.serves_any_format(), Self::ShareGpt),
        ];
        match given.into_iter().find(|&(_, is_given, format)| is_given && format != self) {
            Some((option, _, format)) => {
                let (format, own) = (format.name(), self.name());
                let problem = format!("`{option}` is for {format}, and this trace is {own}: leave it out");
                Err(WorkloadError::Trace { file: file.to_owned(), problem })
            }
            None => Ok(()),
        }
    }

    /// Fills `trace` from a file of this format.
    pub(super) fn read(
        self,
        reader: impl BufRead,
        options: &ReadOptions,
        trace: &mut Trace,
    ) -> Result<(), WorkloadError> {
        self.check(options, &trace.meta.file)?;
        match self {
            Self::Azure => azure::read(reader, options, trace),
            Self::BurstGpt => burst_gpt::read(reader, options, trace),
            Self::Mooncake => mooncake::read(reader, options, trace),
            Self::ShareGpt => share_gpt::read(reader, options, trace),
        }
    }

    /// Whether its clock is so coarse that requests of one tick are spread over it, unless a workload says otherwise.
    pub(crate) fn ticks(self) -> bool {
        match self {
            Self::BurstGpt | Self::Mooncake => true,
            Self::Azure | Self::ShareGpt => false,
        }
    }

    /// Tells the format from the beginning of a file (its first line should be in it).
    ///
    /// # Errors
    /// When it is none that is known.
    pub fn sniff(start: &[u8], file: &str) -> Result<Self, WorkloadError> {
        let start = start.strip_prefix(b"\xef\xbb\xbf").unwrap_or(start).trim_ascii_start();
        let line = start.split(|&b| b == b'\n').next().unwrap_or_default().trim_ascii_end();
        let has =
            |columns: &[&str]| columns.iter().all(|c| line.split(|&b| b == b',').any(|f| f == c.as_bytes()));
        match start.first() {
            Some(b'[') => Ok(Self::ShareGpt),
            Some(b'{') => Ok(Self::Mooncake),
            Some(_) if has(&azure::COLUMNS) => Ok(Self::Azure),
            Some(_) if has(&burst_gpt::COLUMNS) => Ok(Self::BurstGpt),
            Some(_) => {
                let line = String::from_utf8_lossy(&line[..line.len().min(80)]).into_owned();
                Err(WorkloadError::UnknownFormat {
                    file: file.to_owned(),
                    problem: format!("it begins {line:?}"),
                })
            }
            None => {
                Err(WorkloadError::UnknownFormat { file: file.to_owned(), problem: "it is empty".into() })
            }
        }
    }
}
