//! The most probable tokens, without sorting the vocabulary.

use std::cmp::Ordering;

use super::passes::{self, Weighting};
use crate::cpu::Isa;

/// Logits in a block, whose greatest stands for it.
const BLOCK: usize = 64;

/// Some of the most probable tokens, most probable first, lowest id first among equals.
#[derive(Debug, Default)]
pub(super) struct Candidates {
    blocks: Vec<f32>,
    order: Vec<f32>,
    kept: Vec<(f32, u32)>,
    weights: Vec<f32>,
}

fn by_rank(a: &(f32, u32), b: &(f32, u32)) -> Ordering {
    b.0.total_cmp(&a.0).then(a.1.cmp(&b.1))
}

impl Candidates {
    /// Takes the `count` tokens of the greatest logits, less those below the weighting's cut.
    pub(super) fn select(&mut self, isa: Isa, logits: &[f32], count: usize, weighting: Weighting) {
        passes::block_greatest(isa, logits, BLOCK, &mut self.blocks);
        // At least `count` logits reach the `count`-th greatest block, so the rest need not be looked at.
        let mut floor = weighting.cut;
        if count > 0 && count < self.blocks.len() {
            self.order.clone_from(&self.blocks);
            let (_, nth, _) = self.order.select_nth_unstable_by(count - 1, |a, b| b.total_cmp(a));
            floor = floor.max(*nth);
        }
        self.kept.clear();
        for (block, (&greatest, logits)) in self.blocks.iter().zip(logits.chunks(BLOCK)).enumerate() {
            if greatest >= floor {
                let first = (block * BLOCK) as u32;
                let here = logits.iter().zip(first..).map(|(&logit, token)| (logit, token));
                self.kept.extend(here.filter(|&(logit, _)| logit >= floor));
            }
        }
        if count < self.kept.len() {
            self.kept.select_nth_unstable_by(count, by_rank);
            self.kept.truncate(count);
        }
        self.kept.sort_unstable_by(by_rank);
        self.weights.clear();
        self.weights.extend(self.kept.iter().map(|&(logit, _)| logit));
        passes::weigh_in_place(isa, &mut self.weights, weighting);
    }

    /// Sum of the weights.
    pub(super) fn total(&self) -> f64 {
        self.weights.iter().copied().map(f64::from).sum()
    }

    /// Keeps the fewest whose weights sum to `mass`, one at least; says whether they reach it.
    pub(super) fn keep_mass(&mut self, mass: f64) -> bool {
        let mut sum = 0.0;
        for (i, &weight) in self.weights.iter().enumerate() {
            sum += f64::from(weight);
            if sum >= mass {
                self.weights.truncate(i + 1);
                return true;
            }
        }
        false
    }

    /// The token at `uniform` of the cumulative distribution.
    pub(super) fn draw(&self, uniform: f64) -> usize {
        let mut left = uniform * self.total();
        let mut chosen = 0;
        for (&(_, token), &weight) in self.kept.iter().zip(&self.weights) {
            if weight > 0.0 {
                chosen = token as usize;
                left -= f64::from(weight);
                if left < 0.0 {
                    break;
                }
            }
        }
        chosen
    }
}
