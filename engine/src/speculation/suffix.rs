//! What followed the last tokens most often, here and in earlier requests.

use std::collections::HashMap;

use super::{DraftContext, Drafter};

/// Most tokens of context.
pub(super) const DEPTH_LIMIT: u32 = 64;

/// Nodes of the tree, at most: 48 MB or so.
const NODES: usize = 1 << 20;

/// Share of a context's continuations that a proposal needs to be worth its row.
const FEWEST_SHARE: f64 = 0.2;

/// A tree of all runs of tokens up to a depth, with how often each was seen: the suffix tree of SuffixDecoding, cut at a
/// depth so that a token costs as many updates. When it is full it is begun anew: what is frequent comes back soon.
#[derive(Debug)]
pub(super) struct Suffix {
    depth: usize,
    nodes: Vec<Node>,
    children: HashMap<(u32, u32), u32>,
    /// How many of each sequence's tokens are in the tree.
    seen: HashMap<u64, usize>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Node {
    count: u32,
    /// The child with the highest count, and that count.
    best: Option<(u32, u32)>,
    /// Sum of the children's counts.
    followed: u32,
}

impl Suffix {
    pub(super) fn new(depth: u32) -> Self {
        Self {
            depth: depth as usize,
            nodes: vec![Node::default()],
            children: HashMap::new(),
            seen: HashMap::new(),
        }
    }

    /// Adds the runs that end with the last of `tokens`.
    fn add(&mut self, tokens: &[u32]) {
        if self.nodes.len() + self.depth + 1 > NODES {
            self.nodes.truncate(1);
            self.nodes[0] = Node::default();
            self.children.clear();
        }
        let Some((&token, before)) = tokens.split_last() else { return };
        for length in 0..=self.depth.min(before.len()) {
            // Runs are added whole, so a longer context than one that is missing is missing too.
            let Some(parent) = self.find(&before[before.len() - length..]) else { break };
            self.count(parent, token);
        }
    }

    fn count(&mut self, parent: u32, token: u32) {
        let next = self.nodes.len() as u32;
        let child = *self.children.entry((parent, token)).or_insert(next);
        if child == next {
            self.nodes.push(Node::default());
        }
        self.nodes[child as usize].count += 1;
        let count = self.nodes[child as usize].count;
        let node = &mut self.nodes[parent as usize];
        node.followed += 1;
        // Of equals, the latest.
        if node.best.is_none_or(|(_, best)| count >= best) {
            node.best = Some((token, count));
        }
    }

    fn find(&self, context: &[u32]) -> Option<u32> {
        context.iter().try_fold(0, |node, &token| self.children.get(&(node, token)).copied())
    }

    /// The most frequent continuation of the longest context that has one.
    fn next(&self, context: &[u32]) -> Option<u32> {
        let most = self.depth.min(context.len());
        (1..=most).rev().find_map(|length| {
            let node = self.nodes[self.find(&context[context.len() - length..])? as usize];
            let (token, count) = node.best?;
            (f64::from(count) >= FEWEST_SHARE * f64::from(node.followed)).then_some(token)
        })
    }
}

impl Drafter for Suffix {
    fn propose(&mut self, context: DraftContext<'_>, most: u32, drafts: &mut Vec<u32>) {
        let tokens = context.tokens;
        let seen = self.seen.insert(context.id, tokens.len()).unwrap_or(0);
        for end in seen.min(tokens.len())..tokens.len() {
            self.add(&tokens[..=end][end.saturating_sub(self.depth)..]);
        }
        let mut context = tokens[tokens.len().saturating_sub(self.depth)..].to_vec();
        for _ in 0..most {
            let Some(token) = self.next(&context) else { return };
            drafts.push(token);
            context.push(token);
        }
    }

    fn forget(&mut self, id: u64) {
        self.seen.remove(&id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn propose(drafter: &mut Suffix, id: u64, tokens: &[u32], most: u32) -> Vec<u32> {
        let mut drafts = Vec::new();
        drafter.propose(DraftContext { id, tokens, preemptions: 0 }, most, &mut drafts);
        drafts
    }

    #[test]
    fn earlier_requests_tell_what_follows() {
        let mut drafter = Suffix::new(4);
        assert!(propose(&mut drafter, 1, &[1, 2, 3, 4, 5], 3).is_empty());
        assert_eq!(propose(&mut drafter, 2, &[9, 2, 3], 3), [4, 5]);
        // The longer context decides, and among its continuations the more frequent.
        propose(&mut drafter, 3, &[8, 3, 6, 8, 3, 6, 8, 3, 7], 0);
        assert_eq!(propose(&mut drafter, 4, &[8, 3], 1), [6]);
        assert_eq!(propose(&mut drafter, 5, &[2, 3], 1), [4]);
    }

    #[test]
    fn a_sequence_that_grows_is_added_once() {
        let mut drafter = Suffix::new(2);
        for end in 1..=6 {
            propose(&mut drafter, 1, &[1, 2, 1, 2, 1, 2][..end], 0);
        }
        assert_eq!(drafter.nodes[0].followed, 6);
        assert_eq!(propose(&mut drafter, 1, &[1, 2, 1, 2, 1, 2], 3), [1, 2, 1]);
        drafter.forget(1);
        assert!(drafter.seen.is_empty());
    }

    #[test]
    fn a_full_tree_begins_anew() {
        let mut drafter = Suffix::new(16);
        let tokens: Vec<u32> = (0..100_000).collect();
        propose(&mut drafter, 1, &tokens, 0);
        assert!(drafter.nodes.len() <= NODES && drafter.nodes.len() > 1);
    }
}
