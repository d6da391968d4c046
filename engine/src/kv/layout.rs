//! How KV slots are given out: a switch.

use serde::{Deserialize, Serialize};

use crate::{EngineError, KvPlacement, Request};

/// How a sequence gets its KV slots.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum KvLayout {
    /// Blocks taken as the sequence grows.
    Paged {
        /// Slots in a block, 1 to 256.
        block_size: u32,
    },
    /// One region, reserved when the sequence is admitted.
    Contiguous {
        /// How large.
        reservation: Reservation,
    },
}

/// How much a contiguous layout reserves for a sequence: the three baselines of Kwon et al. (SOSP'23, section 6.1).
/// None reserves more than the model's limit; the allocator rounds each up to a power of two.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reservation {
    /// The model's limit.
    Max,
    /// The prompt and the output's true length rounded up to a power of two; without a true length, `max_tokens`
    /// rounded up.
    Pow2,
    /// The prompt and the output's true length; without one, `max_tokens`.
    Oracle,
}

impl Default for KvLayout {
    fn default() -> Self {
        Self::Paged { block_size: 16 }
    }
}

impl KvLayout {
    /// Checks what can be checked without an executor.
    ///
    /// # Errors
    /// [`EngineError::Config`] when the block size is not one of 1 to 256.
    pub fn validate(self) -> Result<(), EngineError> {
        match self {
            Self::Paged { block_size } if !(1..=256).contains(&block_size) => {
                Err(EngineError::Config(format!("kv.block_size is {block_size}: choose 1 to 256")))
            }
            _ => Ok(()),
        }
    }

    /// An empty placement of this layout, for a batch.
    pub(crate) fn placement(self) -> KvPlacement {
        match self {
            Self::Paged { block_size } => {
                KvPlacement::Paged { block_size, tables: Vec::new(), table_start: Vec::new() }
            }
            Self::Contiguous { .. } => KvPlacement::Contiguous { start: Vec::new() },
        }
    }

    /// Slots to reserve for a request under a contiguous layout, before rounding; 0 under a paged one.
    pub(crate) fn reservation(self, request: &Request, max_model_len: u32) -> u32 {
        let Self::Contiguous { reservation } = self else { return 0 };
        let output = request.true_output_len.map_or(request.max_tokens, |n| n.min(request.max_tokens));
        let output = match reservation {
            Reservation::Max => return max_model_len,
            Reservation::Pow2 => output.checked_next_power_of_two().unwrap_or(u32::MAX),
            Reservation::Oracle => output,
        };
        (request.prompt.len() as u32).saturating_add(output).min(max_model_len)
    }
}

/// KV slots by state at one step; all but `shared` together are all slots.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct KvUsage {
    /// Hold a token's K and V.
    pub used: u64,
    /// Set aside for tokens that their sequence will come to fill (as far as the request tells: its true output
    /// length, else `max_tokens`).
    pub reserved: u64,
    /// Set aside and never to be filled: internal fragmentation.
    pub internal: u64,
    /// Kept for reuse by later requests.
    pub cached: u64,
    /// Free, external fragmentation included.
    pub free: u64,
    /// Slots more that there would be in use if each sequence had its own.
    pub shared: u64,
}

impl KvUsage {
    /// All slots.
    pub fn total(&self) -> u64 {
        self.used + self.reserved + self.internal + self.cached + self.free
    }
}
