//! Penalties on tokens that were seen.

use super::SamplingRule;

/// Applies penalties and remembers what the logits were.
#[derive(Debug, Default)]
pub(super) struct Penalties {
    /// Tokens seen and, for each, whether it is in the output.
    seen: Vec<(u32, bool)>,
    /// Tokens penalized and their logits before, by token.
    original: Vec<(u32, f32)>,
}

impl Penalties {
    /// Applies the rule's penalties; says whether there were any. Tokens outside the vocabulary are passed over.
    pub(super) fn apply(
        &mut self,
        logits: &mut [f32],
        rule: &SamplingRule,
        history: &[u32],
        prompt_len: usize,
    ) -> bool {
        self.original.clear();
        let repetition = rule.repetition_penalty;
        let (presence, frequency) = (rule.presence_penalty, rule.frequency_penalty);
        if repetition == 1.0 && presence == 0.0 && frequency == 0.0 {
            return false;
        }
        self.seen.clear();
        let seen = history.iter().enumerate().map(|(i, &token)| (token, i >= prompt_len));
        self.seen.extend(seen.filter(|&(token, _)| (token as usize) < logits.len()));
        self.seen.sort_unstable();
        for same in self.seen.chunk_by(|a, b| a.0 == b.0) {
            let token = same[0].0;
            let logit = &mut logits[token as usize];
            self.original.push((token, *logit));
            *logit = if *logit > 0.0 { *logit / repetition } else { *logit * repetition };
            let count = same.iter().filter(|&&(_, output)| output).count();
            if count > 0 {
                *logit -= frequency * count as f32 + presence;
            }
        }
        true
    }

    /// The token's logit before penalties, if it was penalized in the last call.
    pub(super) fn original(&self, token: usize) -> Option<f32> {
        let found = self.original.binary_search_by_key(&token, |&(token, _)| token as usize);
        found.ok().map(|i| self.original[i].1)
    }
}
