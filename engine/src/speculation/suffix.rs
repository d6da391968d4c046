//! What followed the last tokens most often, here and in earlier requests.

use std::collections::HashMap;

use super::{Allowance, DraftContext, Drafter};

/// Most tokens of context.
pub(super) const DEPTH_LIMIT: u32 = 64;

/// Nodes of the tree, at most: 48 MB or so.
const NODES: usize = 1 << 20;

/// Share of a context's continuations that a proposal needs to be worth its row.
const FEWEST_SHARE: f64 = 0.2;

/// Proposes by a tree of what was seen in all sequences.
#[derive(Debug)]
pub(super) struct Suffix {
    tree: Tree,
    sequences: HashMap<u64, Place>,
    allowance: Allowance,
}

/// Trees of all runs of tokens up to a depth, with how often each was seen: the suffix tree of SuffixDecoding, cut at a
/// depth so that a token costs as many updates. Requests of one salt have a tree together. When there is no room they are begun
/// anew: what is frequent comes back soon.
#[derive(Debug)]
struct Tree {
    depth: usize,
    nodes: Vec<Node>,
    /// By salt, the node of no context at all.
    roots: HashMap<u64, u32>,
    children: HashMap<(u32, u32), u32>,
    /// Times it was begun anew.
    era: u32,
}

/// What of a sequence is in the tree.
#[derive(Debug)]
struct Place {
    /// Tokens that are.
    seen: usize,
    /// The contexts that end with the last of them: at `n` the node of the last `n` tokens. If a longer one is in the tree, a
    /// shorter one is.
    contexts: Vec<u32>,
    salt: u64,
    /// The tree's era when these were its nodes.
    era: u32,
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
        let tree = Tree {
            depth: depth as usize,
            nodes: Vec::new(),
            roots: HashMap::new(),
            children: HashMap::new(),
            era: 0,
        };
        Self { tree, sequences: HashMap::new(), allowance: Allowance::default() }
    }
}

impl Tree {
    fn root(&mut self, salt: u64) -> u32 {
        *self.roots.entry(salt).or_insert_with(|| {
            self.nodes.push(Node::default());
            self.nodes.len() as u32 - 1
        })
    }

    /// Adds the runs that end with `token`, which goes on from the contexts of `place`, and moves on to those that end with it.
    fn add(&mut self, place: &mut Place, token: u32) {
        // Its runs, and a root for each of those who propose before the next is added.
        if self.nodes.len() + self.depth + 1 > NODES {
            self.nodes.clear();
            self.roots.clear();
            self.children.clear();
            self.era += 1;
        }
        let root = self.root(place.salt);
        if place.era != self.era {
            (place.contexts, place.era) = (vec![root], self.era);
        }
        let mut longer = root;
        for context in &mut place.contexts {
            let child = self.count(*context, token);
            *context = std::mem::replace(&mut longer, child);
        }
        if place.contexts.len() <= self.depth {
            place.contexts.push(longer);
        }
        place.seen += 1;
    }

    /// Counts `token` after the context `parent`; the node of both.
    fn count(&mut self, parent: u32, token: u32) -> u32 {
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
        child
    }

    /// The contexts that end with `token` after `contexts`: those that are in the tree.
    fn follow(&self, contexts: &[u32], token: u32) -> Vec<u32> {
        let longer = contexts.iter().map_while(|&node| self.children.get(&(node, token)).copied());
        std::iter::once(contexts[0]).chain(longer).take(self.depth + 1).collect()
    }

    /// The contexts that end with the last of `tokens`.
    fn find(&mut self, salt: u64, tokens: &[u32]) -> Vec<u32> {
        let last = &tokens[tokens.len().saturating_sub(self.depth)..];
        let root = self.root(salt);
        last.iter().fold(vec![root], |contexts, &token| self.follow(&contexts, token))
    }

    /// The most frequent continuation of the longest context that has one.
    fn next(&self, contexts: &[u32]) -> Option<u32> {
        contexts[1..].iter().rev().find_map(|&context| {
            let node = self.nodes[context as usize];
            let (token, count) = node.best?;
            (f64::from(count) >= FEWEST_SHARE * f64::from(node.followed)).then_some(token)
        })
    }
}

impl Drafter for Suffix {
    fn begin(&mut self) {
        self.allowance = Allowance::default();
    }

    fn propose(&mut self, context: DraftContext<'_>, most: u32, drafts: &mut Vec<u32>) {
        let (tree, tokens, salt) = (&mut self.tree, context.tokens, context.cache_salt);
        let start = || Place { seen: 0, contexts: vec![tree.root(salt)], salt, era: tree.era };
        let place = self.sequences.entry(context.id).or_insert_with(start);
        let seen = place.seen.min(tokens.len());
        if place.era != tree.era {
            (place.contexts, place.era) = (tree.find(salt, &tokens[..seen]), tree.era);
        }
        let end = seen + self.allowance.take(tokens.len() - seen);
        for &token in &tokens[seen..end] {
            tree.add(place, token);
        }
        let mut contexts = if end == tokens.len() { place.contexts.clone() } else { tree.find(salt, tokens) };
        for _ in 0..most {
            let Some(token) = tree.next(&contexts) else { return };
            drafts.push(token);
            contexts = tree.follow(&contexts, token);
        }
    }

    fn forget(&mut self, id: u64) {
        self.sequences.remove(&id);
    }
}

#[cfg(test)]
mod tests {
    use super::super::{PROMPT_TOKENS, STEP_TOKENS};
    use super::*;
    use crate::kv::KvHold;

    fn context(id: u64, tokens: &[u32]) -> DraftContext<'_> {
        DraftContext { id, tokens, cache_salt: 0, preemptions: 0, kv: &KvHold::None }
    }

    fn propose(drafter: &mut Suffix, id: u64, tokens: &[u32], most: u32) -> Vec<u32> {
        let mut drafts = Vec::new();
        drafter.begin();
        drafter.propose(context(id, tokens), most, &mut drafts);
        drafts
    }

    #[test]
    fn what_others_ask_is_told_to_their_own_alone() {
        let mut drafter = Suffix::new(4);
        let mut drafts = |id, cache_salt| {
            let mut drafts = Vec::new();
            drafter.propose(DraftContext { cache_salt, ..context(id, &[1, 2, 3]) }, 1, &mut drafts);
            drafter.propose(DraftContext { cache_salt, ..context(id, &[1, 2, 3, 1, 2]) }, 1, &mut drafts);
            drafter.forget(id);
            drafts
        };
        assert_eq!(drafts(1, 7), [3]);
        let mut after = |cache_salt| {
            let mut drafts = Vec::new();
            drafter.propose(DraftContext { cache_salt, ..context(2, &[9, 2]) }, 1, &mut drafts);
            drafter.forget(2);
            drafts
        };
        assert_eq!((after(7), after(0), after(8)), (vec![3], vec![], vec![]));
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
        assert_eq!(drafter.tree.nodes[0].followed, 6);
        assert_eq!(propose(&mut drafter, 1, &[1, 2, 1, 2, 1, 2], 3), [1, 2, 1]);
        drafter.forget(1);
        assert!(drafter.sequences.is_empty());
    }

    #[test]
    fn a_full_tree_begins_anew() {
        let mut drafter = Suffix::new(16);
        let tokens: Vec<u32> = (0..100_000).collect();
        propose(&mut drafter, 2, &[1, 2, 3], 0);
        while drafter.tree.era == 0 {
            propose(&mut drafter, 1, &tokens, 0);
            assert!(drafter.tree.nodes.len() <= NODES);
        }
        // What others knew of the old tree is looked up in the new one.
        assert!(propose(&mut drafter, 2, &[1, 2, 3], 1).is_empty());
        let seen = drafter.sequences[&1].seen;
        assert_eq!(propose(&mut drafter, 2, &[1, 2, 3, tokens[seen - 2]], 1), [tokens[seen - 1]]);
    }

    #[test]
    fn the_contexts_of_a_place_are_those_of_its_tokens() {
        let mut drafter = Suffix::new(5);
        let tokens: Vec<u32> = (0..200).map(|i| i * i % 7).collect();
        for end in 1..=tokens.len() {
            propose(&mut drafter, 1, &tokens[..end], 0);
            assert_eq!(drafter.sequences[&1].contexts, drafter.tree.find(0, &tokens[..end]));
            assert_eq!(drafter.sequences[&1].contexts.len(), 1 + end.min(5));
        }
    }

    #[test]
    fn a_long_prompt_is_added_in_parts() {
        let mut drafter = Suffix::new(4);
        let tokens: Vec<u32> = (0..5000).map(|i| i % 10).collect();
        let begun = |drafter: &mut Suffix, id| {
            let mut drafts = Vec::new();
            drafter.propose(context(id, &tokens), 2, &mut drafts);
            (drafter.sequences[&id].seen, drafts)
        };
        // What was seen of it says what follows already.
        assert_eq!(begun(&mut drafter, 1), (STEP_TOKENS + PROMPT_TOKENS, vec![0, 1]));
        assert_eq!(begun(&mut drafter, 2), (STEP_TOKENS, vec![0, 1]));
        drafter.begin();
        assert_eq!(begun(&mut drafter, 2), (2 * STEP_TOKENS + PROMPT_TOKENS, vec![0, 1]));
        for _ in 0..5 {
            propose(&mut drafter, 1, &tokens, 0);
        }
        assert_eq!(drafter.sequences[&1].seen, 5000);
    }
}
