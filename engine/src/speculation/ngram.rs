//! Prompt look-up: what followed the last tokens where they stood before.

use std::collections::HashMap;

use super::{Allowance, DraftContext, Drafter};

/// Most tokens to look up: a token is indexed once for each length.
pub(super) const LONGEST_LIMIT: u32 = 64;

/// Proposes what followed the latest earlier place of the sequence's last tokens; of look-ups that find one, the longest
/// counts. The index of a sequence grows with it: a step costs a few look-ups, whatever its length.
#[derive(Debug)]
pub(super) struct NGram {
    longest: usize,
    shortest: usize,
    sequences: HashMap<u64, Index>,
    allowance: Allowance,
}

/// Where each n-gram of a sequence ends: its latest place but the sequence's end.
#[derive(Debug, Default)]
struct Index {
    /// Tokens of which all n-grams that end before the last are in `ends`: of a long prompt, only after some steps.
    seen: usize,
    /// By length and hash of the n-gram, one past its last token. Hashes may collide: what is found is compared.
    ends: HashMap<(u32, u64), u32>,
}

impl NGram {
    pub(super) fn new(longest: u32, shortest: u32) -> Self {
        Self {
            longest: longest as usize,
            shortest: shortest as usize,
            sequences: HashMap::new(),
            allowance: Allowance::default(),
        }
    }
}

impl Drafter for NGram {
    fn begin(&mut self) {
        self.allowance = Allowance::default();
    }

    fn propose(&mut self, context: DraftContext<'_>, most: u32, drafts: &mut Vec<u32>) {
        let tokens = context.tokens;
        let index = self.sequences.entry(context.id).or_default();
        if index.seen > tokens.len() {
            *index = Index::default();
        }
        // The n-grams that end at the last token are what is looked up, and not known before.
        let seen = index.seen + self.allowance.take(tokens.len() - index.seen);
        for end in index.seen.max(1)..seen {
            for n in self.shortest..=self.longest.min(end) {
                index.ends.insert((n as u32, hash(&tokens[end - n..end])), end as u32);
            }
        }
        index.seen = seen;
        for n in (self.shortest..=self.longest.min(tokens.len())).rev() {
            let last = &tokens[tokens.len() - n..];
            let Some(&end) = index.ends.get(&(n as u32, hash(last))) else { continue };
            let end = end as usize;
            if tokens[end - n..end] == *last {
                // Past the end, what is proposed goes on like itself: a repetition stays one.
                drafts.extend((0..most as usize).map(|i| tokens[end + i % (tokens.len() - end)]));
                return;
            }
        }
    }

    fn forget(&mut self, id: u64) {
        self.sequences.remove(&id);
    }
}

fn hash(tokens: &[u32]) -> u64 {
    tokens.iter().fold(0, |sum, &token| quire_kernels::generated::mix(sum ^ u64::from(token)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kv::KvHold;

    fn propose(drafter: &mut NGram, tokens: &[u32], most: u32) -> Vec<u32> {
        let mut drafts = Vec::new();
        drafter.begin();
        drafter.propose(
            DraftContext { id: 1, tokens, cache_salt: 0, preemptions: 0, kv: &KvHold::None },
            most,
            &mut drafts,
        );
        drafts
    }

    #[test]
    fn what_followed_before_is_proposed() {
        let mut drafter = NGram::new(3, 2);
        assert!(propose(&mut drafter, &[1, 2, 3, 4], 3).is_empty());
        assert_eq!(propose(&mut drafter, &[1, 2, 3, 4, 1, 2], 3), [3, 4, 1]);
        // The latest place counts, and the longer look-up.
        assert_eq!(propose(&mut drafter, &[1, 2, 3, 4, 1, 2, 5, 1, 2], 1), [5]);
        assert_eq!(propose(&mut drafter, &[1, 2, 3, 4, 1, 2, 5, 1, 2, 3], 2), [4, 1]);
        drafter.forget(1);
        assert!(drafter.sequences.is_empty());
    }

    #[test]
    fn a_long_prompt_is_indexed_in_parts() {
        let mut drafter = NGram::new(2, 2);
        let mut tokens: Vec<u32> = (0..5000).collect();
        tokens.extend([4000, 4001]);
        // The place is not known before its part is.
        let steps: Vec<Vec<u32>> = (0..5).map(|_| propose(&mut drafter, &tokens, 1)).collect();
        assert_eq!(steps, [vec![], vec![], vec![], vec![4002], vec![4002]]);
        assert_eq!(drafter.sequences[&1].seen, tokens.len());
    }

    #[test]
    fn a_loop_is_proposed_as_far_as_wanted() {
        let mut drafter = NGram::new(2, 1);
        assert_eq!(propose(&mut drafter, &[7, 7], 4), [7, 7, 7, 7]);
        assert_eq!(propose(&mut NGram::new(2, 2), &[1, 2, 1, 2], 5), [1, 2, 1, 2, 1]);
    }
}
