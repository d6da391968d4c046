//! Names of blocks by what they hold, so that a later request finds the K and V of a prompt's beginning.

use sha2::{Digest, Sha256};

/// What a full block holds, and everything before it: equal names, equal K and V.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct BlockName([u8; 16]);

impl BlockName {
    /// The name before the first block, for tokens that only requests of this salt share.
    pub fn root(salt: u64) -> Self {
        Self::digest(Sha256::new().chain_update(b"root").chain_update(salt.to_le_bytes()))
    }

    /// The name of the block of these tokens after the block of this name.
    ///
    /// A cryptographic hash, since a collision would answer one request with another's context, and requests may be
    /// made to collide.
    #[must_use]
    pub fn then(self, tokens: &[u32]) -> Self {
        let mut hash = Sha256::new().chain_update(self.0);
        tokens.iter().for_each(|token| hash.update(token.to_le_bytes()));
        Self::digest(hash)
    }

    fn digest(hash: Sha256) -> Self {
        let mut name = [0; 16];
        name.copy_from_slice(&hash.finalize()[..16]);
        Self(name)
    }
}

/// The names of a sequence's full blocks, as far as its tokens are known.
#[derive(Debug, Clone)]
pub struct BlockNames {
    block_size: u32,
    root: BlockName,
    names: Vec<BlockName>,
}

impl BlockNames {
    /// No names yet, for blocks of `block_size` tokens.
    ///
    /// # Panics
    /// When `block_size` is 0.
    pub fn new(block_size: u32, salt: u64) -> Self {
        assert!(block_size > 0, "a block has at least one slot");
        Self { block_size, root: BlockName::root(salt), names: Vec::new() }
    }

    /// Names the blocks that `tokens`, of which no earlier ones have changed, fill by now.
    pub fn extend(&mut self, tokens: &[u32]) {
        let size = self.block_size as usize;
        for block in tokens.chunks_exact(size).skip(self.names.len()) {
            let before = self.names.last().copied().unwrap_or(self.root);
            self.names.push(before.then(block));
        }
    }

    /// Tokens in a block.
    pub fn block_size(&self) -> u32 {
        self.block_size
    }

    /// The names, the first block's first.
    pub fn as_slice(&self) -> &[BlockName] {
        &self.names
    }
}
