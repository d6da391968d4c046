//! The KV cache's bookkeeping: which slots of the executor's KV memory belong to whom. No device, no locks.
//!
//! The memory is an array of slots, one a token. A [`KvLayout`] decides how slots are given out: blocks through a
//! [`BlockTable`], counted by a [`BlockPool`], or one region a sequence from a [`BuddyAllocator`]. With a prefix cache, full
//! blocks have a [`BlockName`], by which later sequences find and share them.

mod block_pool;
mod block_table;
mod buddy;
mod layout;
mod memory;
mod prefix;
mod trial;

pub use block_pool::BlockPool;
pub use block_table::BlockTable;
pub use buddy::{BuddyAllocator, Region};
pub use layout::{KvLayout, KvUsage, Reservation};
pub(crate) use memory::{KvHold, KvMemory};
pub use prefix::{BlockName, BlockNames};
pub use trial::KvTrial;
