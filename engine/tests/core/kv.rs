//! Block pool, block table, buddy allocator, reservations.

use proptest::prelude::*;
use quire_engine::kv::{BlockName, BlockNames, BlockPool, BlockTable, BuddyAllocator, Region};

#[test]
fn a_block_is_free_again_after_its_last_reference() {
    let mut pool = BlockPool::new(2);
    let (a, b) = (pool.allocate().unwrap(), pool.allocate().unwrap());
    assert_eq!((a, b, pool.allocate()), (0, 1, None));
    pool.retain(a);
    assert!(!pool.release(a));
    assert_eq!((pool.free(), pool.referenced(), pool.references(a)), (0, 2, 1));
    assert!(pool.release(a));
    assert_eq!((pool.free(), pool.referenced()), (1, 1));
    assert_eq!(pool.allocate(), Some(a), "the last freed is given out first");
    pool.recount();
}

#[test]
#[should_panic(expected = "block 0 is freed twice")]
fn a_double_free_is_caught() {
    let mut pool = BlockPool::new(1);
    let block = pool.allocate().unwrap();
    pool.release(block);
    pool.release(block);
}

#[test]
fn a_table_maps_positions_and_takes_all_or_nothing() {
    let mut pool = BlockPool::new(3);
    let first = pool.allocate().unwrap();
    let mut table = BlockTable::new(4);
    assert!(table.grow(5, &mut pool));
    assert_eq!((table.blocks(), table.slots()), (&[1, 2][..], 8));
    assert_eq!([0, 3, 4, 7].map(|p| table.slot(p)), [4, 7, 8, 11]);
    assert!(!table.grow(9, &mut pool) && table.slots() == 8);
    pool.release(first);
    assert!(table.grow(9, &mut pool));
    assert_eq!(table.slot(8), 0);
    table.release(&mut pool);
    assert_eq!((table.slots(), pool.free()), (0, 3));
}

#[test]
fn buddies_split_and_join() {
    let mut buddy = BuddyAllocator::new(16);
    let small = buddy.allocate(3).unwrap();
    assert_eq!(small, Region { start: 0, order: 2 });
    let half = buddy.allocate(8).unwrap();
    assert_eq!(half.start, 8);
    assert_eq!((buddy.free_slots(), buddy.allocate(5)), (4, None), "4 slots are free, 8 are needed");
    buddy.release(small);
    assert_eq!(buddy.allocate(5), Some(Region { start: 0, order: 3 }));
    buddy.recount();
}

#[test]
fn a_total_that_is_no_power_of_two_is_used_whole() {
    let mut buddy = BuddyAllocator::new(13);
    assert_eq!(buddy.largest(), 8);
    let starts: Vec<_> = [8, 4, 1].map(|slots| buddy.allocate(slots).unwrap().start).into();
    assert_eq!((starts, buddy.free_slots()), (vec![0, 8, 12], 0));
    buddy.release(Region { start: 8, order: 2 });
    buddy.release(Region { start: 12, order: 0 });
    buddy.recount();
    assert_eq!(buddy.allocate(8), None);
    assert_eq!(BuddyAllocator::new(0).allocate(1), None);
    assert_eq!(
        BuddyAllocator::new(u32::MAX).allocate(u32::MAX),
        None,
        "no power of two that large is 32 bits"
    );
}

#[test]
#[should_panic(expected = "is freed, but None was taken there")]
fn a_region_not_given_out_is_not_taken_back() {
    BuddyAllocator::new(8).release(Region { start: 0, order: 0 });
}

proptest! {
    #[test]
    fn regions_never_overlap_and_all_come_back(
        total in 1_u32..700,
        steps in prop::collection::vec((any::<bool>(), 1_u32..300), 1..200),
    ) {
        let mut buddy = BuddyAllocator::new(total);
        let mut taken: Vec<Region> = Vec::new();
        for (allocate, number) in steps {
            if allocate {
                let fits = buddy.allocate(number);
                if let Some(region) = fits {
                    prop_assert!(region.slots() >= number && region.slots() < 2 * number);
                    taken.push(region);
                } else if taken.is_empty() {
                    prop_assert!(number.next_power_of_two() > buddy.largest());
                }
            } else if !taken.is_empty() {
                buddy.release(taken.swap_remove(number as usize % taken.len()));
            }
            buddy.recount();
            let held: u32 = taken.iter().map(|region| region.slots()).sum();
            prop_assert_eq!(held + buddy.free_slots(), total);
        }
        taken.into_iter().for_each(|region| buddy.release(region));
        buddy.recount();
        prop_assert_eq!(buddy.allocate(buddy.largest()).map(|region| region.start), Some(0));
    }

    #[test]
    fn blocks_are_free_or_referenced(
        blocks in 0_u32..40,
        steps in prop::collection::vec((0_u8..3, any::<prop::sample::Index>()), 1..200),
    ) {
        let mut pool = BlockPool::new(blocks);
        let mut references: Vec<u32> = Vec::new();
        for (kind, index) in steps {
            match kind {
                0 => references.extend(pool.allocate()),
                _ if references.is_empty() => {}
                1 => {
                    let block = references[index.index(references.len())];
                    pool.retain(block);
                    references.push(block);
                }
                _ => {
                    let block = references.swap_remove(index.index(references.len()));
                    prop_assert_eq!(pool.release(block), !references.contains(&block));
                }
            }
            pool.recount();
        }
    }
}

#[test]
fn a_named_block_is_kept_and_found_until_memory_is_needed() {
    let mut pool = BlockPool::new(3);
    let names: Vec<BlockName> = (0..3).map(BlockName::root).collect();
    let blocks: Vec<u32> = (0..3).map(|_| pool.allocate().unwrap()).collect();
    pool.name(blocks[0], names[0]);
    pool.name(blocks[1], names[1]);
    pool.name(blocks[2], names[1]);
    assert_eq!(pool.find(names[1]), Some(blocks[1]), "the first of a name is the one that is found");
    blocks.iter().for_each(|&block| assert!(pool.release(block)));
    assert_eq!((pool.free(), pool.cached(), pool.available()), (1, 2, 3));
    pool.recount();
    // The one without a name is given out first, then the one that was left first, which loses its name.
    assert_eq!(pool.allocate(), Some(blocks[2]));
    pool.retain(blocks[1]);
    assert_eq!(pool.allocate(), Some(blocks[0]));
    assert_eq!((pool.find(names[0]), pool.find(names[1]), pool.allocate()), (None, Some(blocks[1]), None));
    pool.retain(blocks[1]);
    assert_eq!((pool.shared(), pool.references(blocks[1])), (1, 2));
    pool.recount();
    assert!(!pool.release(blocks[1]) && pool.release(blocks[1]));
    assert_eq!((pool.shared(), pool.cached()), (0, 1));
}

#[test]
fn a_name_tells_all_that_came_before() {
    let names = |tokens: &[u32]| {
        let mut names = BlockNames::new(2, 0);
        names.extend(&tokens[..tokens.len() / 2]);
        names.extend(tokens);
        names.as_slice().to_vec()
    };
    let plain = names(&[1, 2, 3, 4, 5]);
    assert_eq!(plain.len(), 2, "half a block has no name");
    assert_eq!(plain, names(&[1, 2, 3, 4]));
    assert!(plain[1] != names(&[9, 2, 3, 4])[1] && plain[0] != names(&[3, 4])[0]);
}
