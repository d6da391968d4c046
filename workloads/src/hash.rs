//! Hashes that are the same on every machine and in every version.

/// A 64-bit hash of token ids: FNV-1a over their little-endian bytes. For noticing that outputs differ, not for
/// standing up to an adversary.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TokenHasher(u64);

impl TokenHasher {
    /// The hash of no tokens.
    pub fn new() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }

    /// Takes in more tokens.
    pub fn update(&mut self, tokens: &[u32]) {
        for byte in tokens.iter().flat_map(|token| token.to_le_bytes()) {
            self.0 = (self.0 ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }

    /// The hash as 16 hexadecimal digits.
    pub fn hex(&self) -> String {
        format!("{:016x}", self.0)
    }
}

impl Default for TokenHasher {
    fn default() -> Self {
        Self::new()
    }
}

/// The hash of a list of tokens as 16 hexadecimal digits; see [`TokenHasher`].
pub fn token_hash(tokens: &[u32]) -> String {
    let mut hasher = TokenHasher::new();
    hasher.update(tokens);
    hasher.hex()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agrees_with_published_vectors_and_does_not_depend_on_cuts() {
        // FNV-1a 64 of the empty string and of "foob" (one token of those four bytes).
        assert_eq!(token_hash(&[]), "cbf29ce484222325");
        assert_eq!(token_hash(&[u32::from_le_bytes(*b"foob")]), "dd120e790c2512af");
        let mut cut = TokenHasher::new();
        cut.update(&[1, 2]);
        cut.update(&[3]);
        assert_eq!(cut.hex(), token_hash(&[1, 2, 3]));
        assert_ne!(token_hash(&[1, 2, 3]), token_hash(&[3, 2, 1]));
    }
}
