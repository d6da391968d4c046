// The warpgroup of attention_prefill_hopper.cu that copies queries, keys and values to shared memory.
#pragma once
#include "attention_prefill_hopper_layout.cuh"
#include "barriers.cuh"

// The copies of one warp, in order, of which the last may still be on its way. Matrix instructions may read what was
// copied only after a fence by the threads that copied it, when it is there.
struct Copies {
    u32 pending = 0;  // barrier to tell when the last is there

    __device__ __forceinline__ void tell() {
        fence_async();
        __syncwarp();
        if (threadIdx.x % WARP == 0) barrier_arrive(pending);
    }
    __device__ __forceinline__ void finish() {
        if (pending == 0) return;
        copy_async_wait<0>();
        tell();
        pending = 0;
    }
    // Waits for room. If it must wait, what is on its way must not: the room may depend on it.
    __device__ __forceinline__ void wait_for_room(u32 barrier, u32 parity) {
        if (__all_sync(ALL_LANES, barrier_test(barrier, parity))) return;
        finish();
        barrier_wait(barrier, parity);
    }
    __device__ __forceinline__ void started(u32 barrier) {
        copy_async_commit();
        if (pending != 0) {
            copy_async_wait<1>();
            tell();
        }
        pending = barrier;
    }
};

// A warp starts copying its rows of a tile of TILE_ROWS, of D elements each, lane i holding the number of its row i;
// `rows` is this lane's piece of row 0. Rows without a number become zero: a weight of zero times what an unused slot may hold would
// not be zero if that is no number.
template <u32 D, u32 TILE_ROWS>
__device__ __forceinline__ void copy_rows(u32 tile, const u8* rows, u32 row_bytes, u32 number) {
    constexpr u32 LANES = LANES_OF_ROW<D>, AT_ONCE = WARP / LANES;
    const u32 lane = threadIdx.x % WARP;
    const u32 row = lane / LANES, piece = lane % LANES;
    const u32 own = tile + threadIdx.x / WARP * (WARP_ROWS<TILE_ROWS> * 128);
    const u32 to = own + piece / 8 * SPAN<TILE_ROWS> + row * 128 + (piece % 8 ^ row) * 16;
#pragma unroll
    for (u32 first = 0; first < WARP_ROWS<TILE_ROWS>; first += AT_ONCE) {
        const u32 mine = __shfl_sync(ALL_LANES, number, int(first + row));
        const bool valid = mine != NO_SLOT;
        if (piece < D / 8) {
            copy_async_16((to ^ first % 8 * 16) + first * 128, rows + u64(valid ? mine : 0) * row_bytes, valid);
        }
    }
}

// Where a piece of work's item is.
__device__ __forceinline__ const Words4* item_of(const Arguments& args, u32 piece) {
    return args.items + piece / args.kv_heads * 2;
}

// The warpgroup that copies.
template <class S, class Addressing>
__device__ __forceinline__ void produce(const Arguments& args, const Addressing& addressing, u32 base) {
    constexpr u32 D = S::D, HEAD_BYTES = 2 * D, TILE = S::TILE, OWN = WARP_ROWS<TILE>;
    const u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const u32 lane_byte = lane % LANES_OF_ROW<D> * 16;
    const u32 group = args.heads / args.kv_heads;
    Copies copies;
    u32 keys = 0, values = 0;  // tiles copied so far
    u32 piece = piece_of(0);  // there are no more CTAs than pieces
    Words4 head = *item_of(args, piece), body = item_of(args, piece)[1];
    u32 start = __ldg(args.starts + head.x);
    for (u32 round = 0; piece < args.pieces;) {
        const u32 kv_head = piece % args.kv_heads;
        const u32 from = body.y, end = body.z;
        const auto find = [&](u32 position) {
            return look_up<OWN>(addressing, start, position + warp * OWN, from, end);
        };
        u32 position = from / TILE * TILE;
        Lookup found = find(position);

        const auto copy_queries = [&] {
            const Place<S::QUERIES> room(round);
            copies.wait_for_room(base + S::QUERIES_FREE + room.index * 8, room.parity ^ 1);
            if (threadIdx.x == 0) {
                store_shared(S::work(base, round), head);
                store_shared(S::work(base, round) + 16, Words4{body.x, body.y, body.z, kv_head});
            }
            const u32 row = body.x + warp * WARP + lane, query = row / group;
            const u32 of_row = kv_head * group + (row - query * group);
            const u32 number = (head.y + query) * (args.heads + 2 * args.kv_heads) + of_row;
            copy_rows<D, ROWS>(base + room.index * S::QUERY_BYTES, reinterpret_cast<const u8*>(args.qkv) + lane_byte,
                               HEAD_BYTES, row < head.z * group ? number : NO_SLOT);
            copies.started(base + S::QUERIES_FULL + room.index * 8);

            // The next item, which is needed when this one's last tile is on its way.
            piece = piece_of(++round);
            if (piece < args.pieces) {
                head = *item_of(args, piece);
                body = item_of(args, piece)[1];
            }
        };
        // Where they wait for the last item's to have been read, keys come before.
        if (S::QUERIES > 1) copy_queries();

        const u32 head_byte = kv_head * HEAD_BYTES + lane_byte, slot_bytes = args.kv_heads * HEAD_BYTES;
        const auto copy_values = [&](u32 slot) {
            const Place<S::STAGES> room(values++);
            copies.wait_for_room(base + S::VALUES_FREE + room.index * 8, room.parity ^ 1);
            copy_rows<D, TILE>(base + S::VALUES + room.index * S::BYTES,
                               reinterpret_cast<const u8*>(args.values) + head_byte, slot_bytes, slot);
            copies.started(base + S::VALUES_FULL + room.index * 8);
        };
        // A tile's values are needed after the next tile's keys.
        u32 slot_before = 0;
        for (bool first = true; position < end; position += TILE, first = false) {
            const u32 slot = addressing.slot(found);
            found = find(position + TILE);
            const Place<S::STAGES> room(keys++);
            copies.wait_for_room(base + S::KEYS_FREE + room.index * 8, room.parity ^ 1);
            copy_rows<D, TILE>(base + S::KEYS + room.index * S::BYTES,
                               reinterpret_cast<const u8*>(args.keys) + head_byte, slot_bytes, slot);
            copies.started(base + S::KEYS_FULL + room.index * 8);
            if (S::QUERIES == 1 && first) copy_queries();
            if (!first) copy_values(slot_before);
            slot_before = slot;
        }
        if (piece < args.pieces) start = __ldg(args.starts + head.x);
        copy_values(slot_before);
    }
    copies.finish();
}
