use super::*;
use proptest::prelude::*;

#[derive(Debug)]
struct Case {
    heads: HeadShape,
    tuning: Tuning,
    query_start: Vec<u32>,
    context_len: Vec<u32>,
}

impl Case {
    fn plan(&self) -> AttentionPlan {
        let mut plan = AttentionPlan::default();
        plan.update(&self.query_start, &self.context_len, self.heads, &self.tuning);
        plan
    }
    fn group(&self) -> u32 {
        (self.heads.heads / self.heads.kv_heads) as u32
    }
    fn queries(&self, sequence: usize) -> u32 {
        self.query_start[sequence + 1] - self.query_start[sequence]
    }
}

fn cases() -> impl Strategy<Value = Case> {
    let heads = prop::sample::select(vec![(9, 3), (32, 8), (16, 1), (14, 2), (8, 8), (71, 1)]);
    let dims = prop::sample::select(vec![64, 80, 96, 128, 256]);
    let queries = prop_oneof![Just(0u32), Just(1), 1u32..20, 1u32..700];
    let sequence = (queries, prop_oneof![0u32..40, 0u32..9000]);
    let windows = prop::sample::select(vec![0u32, 1, 100, 4096]);
    let switches = any::<(bool, bool)>();
    (heads, dims, windows, switches, prop::collection::vec(sequence, 0..70)).prop_map(
        |((heads, kv_heads), head_dim, window, (one_order, hopper), sequences)| {
            let mut query_start = vec![0];
            query_start.extend(sequences.iter().scan(0, |sum, &(queries, _)| {
                *sum += queries;
                Some(*sum)
            }));
            Case {
                heads: HeadShape { heads, kv_heads, head_dim },
                tuning: Tuning {
                    multiprocessors: 132,
                    one_order,
                    window,
                    kv: KvDtype::Bf16,
                    hopper,
                    shared_bytes: 232_448,
                },
                query_start,
                context_len: sequences.iter().map(|&(queries, before)| before + queries).collect(),
            }
        },
    )
}

/// The decode items of a sequence, checked to cover what its rows see, in order.
fn check_decode(case: &Case, items: &[&[u32; 8]], sequence: usize) {
    let context = case.context_len[sequence];
    let mut at = case.tuning.window_start(context - case.queries(sequence));
    for (split, item) in items.iter().enumerate() {
        assert_eq!(item[1..4], [case.query_start[sequence], case.queries(sequence), context]);
        assert_eq!((item[4], item[6]), (at, (items.len() << 16 | split) as u32));
        assert!(item[5] > at);
        assert_eq!(item[7], items[0][7]);
        at = item[5];
    }
    assert_eq!(at, context);
}

/// The prefill items of a sequence, checked to cover its rows and the positions that they see.
fn check_prefill(case: &Case, tile: u32, items: &[&[u32; 8]], sequence: usize) {
    let (queries, context) = (case.queries(sequence), case.context_len[sequence]);
    let mut items = items.to_vec();
    items.sort_by_key(|item| item[4]);
    let all = queries * case.group();
    assert_eq!(items.len() as u32, all.div_ceil(tile));
    for (index, item) in (0..).zip(items) {
        assert_eq!(item[1..4], [case.query_start[sequence], queries, context]);
        assert_eq!(item[4], index * tile);
        let last = (item[4] + tile).min(all) - 1;
        let position = |row: u32| context - queries + row / case.group();
        assert_eq!(item[5], case.tuning.window_start(position(item[4])));
        assert_eq!(item[6], position(last) + 1);
    }
}

proptest! {
    #[test]
    fn every_row_is_computed_once(case in cases()) {
        let plan = case.plan();
        let of = |items: &'_ [[u32; 8]], sequence: usize| -> Vec<[u32; 8]> {
            items.iter().filter(|item| item[0] as usize == sequence).copied().collect()
        };
        for sequence in 0..case.context_len.len() {
            let (decode, prefill) = (of(&plan.decode_items, sequence), of(&plan.prefill_items, sequence));
            let queries = case.queries(sequence);
            let decodes = queries > 0 && case.tuning.is_decode(queries, case.group() as usize);
            prop_assert_eq!(!decode.is_empty(), decodes);
            prop_assert_eq!(!prefill.is_empty(), queries > 0 && !decodes);
            if decodes {
                check_decode(&case, &decode.iter().collect::<Vec<_>>(), sequence);
            } else if queries > 0 {
                check_prefill(&case, plan.prefill_rows, &prefill.iter().collect::<Vec<_>>(), sequence);
            }
        }
    }

    #[test]
    fn plans_keep_to_their_bounds(case in cases()) {
        let plan = case.plan();
        let sequences = case.context_len.len();
        let rows = *case.query_start.last().unwrap() as usize;
        let bounds = PlanBounds::new(case.heads, &case.tuning);
        prop_assert!(plan.decode_items.len() <= bounds.decode_items(sequences));
        prop_assert!(plan.partial_rows() <= bounds.partial_rows());
        prop_assert!(8 * plan.prefill_items.len() <= bounds.prefill_item_words(rows, sequences));
        prop_assert_eq!(plan.decode_teams.len(), case.tuning.teams(case.heads) + 1);
        prop_assert!(plan.decode_teams.is_sorted());
        prop_assert_eq!(plan.decode_teams[0], 0);
        prop_assert_eq!(*plan.decode_teams.last().unwrap() as usize, plan.decode_items.len());
        let lengths: Vec<u32> = plan.prefill_items.iter().map(|item| (item[6] - item[5]) / ROUND).collect();
        prop_assert!(lengths.is_sorted_by(|a, b| a >= b));
    }
}

/// Positions, with the cost of items, of the busiest team, over an equal share.
fn imbalance(contexts: &[u32]) -> f64 {
    let heads = HeadShape { heads: 32, kv_heads: 8, head_dim: 128 };
    let tuning = Tuning {
        multiprocessors: 132,
        one_order: false,
        window: 0,
        kv: KvDtype::Bf16,
        hopper: true,
        shared_bytes: 232_448,
    };
    let query_start: Vec<u32> = (0..=contexts.len() as u32).collect();
    let mut plan = AttentionPlan::default();
    plan.update(&query_start, contexts, heads, &tuning);
    let cost = |item: &[u32; 8]| u64::from(item[5] - item[4]) + ITEM_COST;
    let team = |range: &[u32]| plan.decode_items[range[0] as usize..range[1] as usize].iter().map(cost).sum();
    let busiest: u64 = plan.decode_teams.windows(2).map(team).max().unwrap();
    let total: u64 = plan.decode_items.iter().map(cost).sum();
    busiest as f64 * tuning.teams(heads) as f64 / total as f64
}

#[test]
fn two_ctas_run_together_where_shared_memory_has_room() {
    let beside = |shared_bytes: u32, head_dim, kv| {
        let heads = HeadShape { heads: 8, kv_heads: 8, head_dim };
        let tuning =
            Tuning { multiprocessors: 80, one_order: false, window: 0, kv, hopper: false, shared_bytes };
        tuning.teams(heads) / 10
    };
    for (kv, on_ada) in [(KvDtype::Bf16, [2, 1, 1, 1, 1]), (KvDtype::Fp8, [2, 2, 2, 2, 1])] {
        for (head_dim, on_ada) in [64, 80, 96, 128, 256].into_iter().zip(on_ada) {
            let found = [227, 163, 99].map(|kilobytes| beside(kilobytes << 10, head_dim, kv));
            assert_eq!(found, [2, 2, on_ada], "heads of {head_dim}, KV of {kv:?}");
        }
    }
}

#[test]
fn teams_have_like_shares() {
    for (sequences, context) in [(1, 8192), (8, 4096), (32, 2048), (128, 1024), (256, 1024), (64, 8192)] {
        let imbalance = imbalance(&vec![context; sequences]);
        assert!(imbalance < 1.1, "{sequences} x {context}: {imbalance}");
    }
    let uneven: Vec<u32> = (0..200).map(|i| 1 + i * i % 977 * 7).collect();
    assert!(imbalance(&uneven) < 1.05, "{}", imbalance(&uneven));
}
