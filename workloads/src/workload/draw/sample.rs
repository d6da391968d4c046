//! Part of a trace: whole conversations, so that what its requests share stays together.

use std::collections::HashMap;

use crate::random::{Stream, Use};
use crate::trace::{Trace, TraceRequest};

/// Which requests of a trace are taken.
pub(super) struct Sample<'a> {
    trace: &'a Trace,
    one_in: u32,
    seed: u64,
    /// Of the blocks that prompts begin with, how many most of them have alike: nothing tells conversations apart there.
    common: usize,
}

impl<'a> Sample<'a> {
    pub(super) fn new(trace: &'a Trace, one_in: u32, seed: u64) -> Self {
        let common = if one_in == 1 { 0 } else { common_blocks(trace) };
        Self { trace, one_in, seed, common }
    }

    pub(super) fn has(&self, i: usize) -> bool {
        self.one_in == 1 || Stream::new(self.seed, Use::Sample, self.conversation(i)).below(self.one_in) == 0
    }

    fn conversation(&self, i: usize) -> u64 {
        let request = &self.trace.requests[i];
        let turn = request.turn.map(|turn| turn.conversation);
        turn.or_else(|| block(request, self.common)).unwrap_or(i as u64)
    }
}

fn block(request: &TraceRequest, at: usize) -> Option<u64> {
    request.prefix.as_ref()?.ids.get(at).copied()
}

fn common_blocks(trace: &Trace) -> usize {
    let is_common = |at: &usize| {
        let mut counts: HashMap<u64, usize> = HashMap::new();
        trace.requests.iter().filter_map(|request| block(request, *at)).for_each(|id| {
            *counts.entry(id).or_default() += 1;
        });
        counts.values().any(|&count| count * 2 > trace.requests.len())
    };
    (0..).take_while(is_common).count()
}
