// The warpgroup of attention_prefill_hopper.cuh that copies queries, keys and values to shared memory.
#pragma once
#include "attention_prefill_hopper_layout.cuh"
#include "barriers.cuh"

// A warp's rows of a tile of TILE_ROWS of D elements, so many at once, one piece of 16 bytes a lane.
template <u32 D, u32 TILE_ROWS>
struct LanePieces {
    static constexpr u32 LANES = LANES_OF_ROW<D>, AT_ONCE = WARP / LANES;
    u32 row;
    u32 piece;
    u32 to;  // of its first row

    __device__ __forceinline__ explicit LanePieces(u32 tile)
        : row(threadIdx.x % WARP / LANES), piece(threadIdx.x % LANES) {
        const u32 own = tile + threadIdx.x / WARP * (WARP_ROWS<TILE_ROWS> * 128);
        to = own + piece / 8 * SPAN<TILE_ROWS> + row * 128 + (piece % 8 ^ row) * 16;
    }
    __device__ __forceinline__ bool exists() const { return piece < D / 8; }
    __device__ __forceinline__ u32 at(u32 first) const { return (to ^ first % 8 * 16) + first * 128; }
};

// A warp starts copying its rows of a tile, lane i holding the number of its row i; `rows` is this lane's piece of row
// 0. Rows without a number become zero: a weight of zero times what an unused slot may hold would not be zero if that is
// no number.
template <u32 D, u32 TILE_ROWS>
__device__ __forceinline__ void copy_rows(u32 tile, const u8* rows, u32 row_bytes, u32 number) {
    const LanePieces<D, TILE_ROWS> own(tile);
#pragma unroll
    for (u32 first = 0; first < WARP_ROWS<TILE_ROWS>; first += own.AT_ONCE) {
        const u32 mine = __shfl_sync(ALL_LANES, number, int(first + own.row));
        const bool valid = mine != NO_SLOT;
        if (own.exists()) copy_async_16(own.at(first), rows + u64(valid ? mine : 0) * row_bytes, valid);
    }
}

// A lane makes of the queries that it copied what is multiplied.
template <class S>
__device__ __forceinline__ void round_queries(u32 tile) {
    const LanePieces<S::D, ROWS> own(tile);
    if (!own.exists()) return;
#pragma unroll 2
    for (u32 first = 0; first < WARP_ROWS<ROWS>; first += own.AT_ONCE) {
        const Words4 words = load_shared(own.at(first));
        store_shared(own.at(first), {S::Kv::query(words.x), S::Kv::query(words.y), S::Kv::query(words.z),
                                     S::Kv::query(words.w)});
    }
}

// The same of rows of bytes: 16 elements a lane. Eight lanes that follow one another have pieces of two rows, so that
// what they become is in different banks.
template <u32 D, u32 TILE_ROWS>
struct LaneBytes {
    static constexpr u32 LANES = LANES_OF_STORED_ROW<D>, AT_ONCE = WARP / LANES;
    static constexpr u32 STRIDE = WARP * 16;  // from the pieces of all lanes to their next ones
    u32 row;
    u32 piece;

    __device__ __forceinline__ LaneBytes() {
        const u32 lane = threadIdx.x % WARP;
        row = lane / 4 % 2 + lane / 8 / (LANES / 4) * 2;
        piece = lane % 4 + lane / 8 % (LANES / 4) * 4;
    }
    __device__ __forceinline__ bool exists() const { return piece < D / 16; }
    // Where this lane's first piece waits.
    static __device__ __forceinline__ u32 stored(u32 tile) {
        return tile + threadIdx.x / WARP * (WARP_ROWS<TILE_ROWS> / AT_ONCE * STRIDE) + threadIdx.x % WARP * 16;
    }
};

template <class S>
__device__ __forceinline__ void copy_bytes(u32 stored, const u8* rows, u32 row_bytes, u32 number) {
    const LaneBytes<S::D, S::TILE> own;
    const u32 to = own.stored(stored);
#pragma unroll
    for (u32 first = 0; first < WARP_ROWS<S::TILE>; first += own.AT_ONCE) {
        const u32 mine = __shfl_sync(ALL_LANES, number, int(first + own.row));
        const bool valid = mine != NO_SLOT;
        const u32 at = to + first / own.AT_ONCE * own.STRIDE;
        if (own.exists()) copy_async_16(at, rows + u64(valid ? mine : 0) * row_bytes, valid);
    }
}

// A lane widens the bytes that it copied into a tile of halves.
template <class S>
__device__ __forceinline__ void widen_bytes(u32 tile, u32 stored) {
    const LaneBytes<S::D, S::TILE> own;
    if (!own.exists()) return;
    const u32 from = own.stored(stored);
    const u32 rows = tile + threadIdx.x / WARP * (WARP_ROWS<S::TILE> * 128);
    const u32 to = rows + own.piece / 4 * SPAN<S::TILE> + own.row * 128 + (own.piece % 4 * 2 ^ own.row) * 16;
    constexpr int AT_ONCE = S::D > 128 ? 1 : 2;  // more spill registers
#pragma unroll AT_ONCE
    for (u32 first = 0; first < WARP_ROWS<S::TILE>; first += own.AT_ONCE) {
        const Words4 bytes = load_shared(from + first / own.AT_ONCE * own.STRIDE);
        const u32 at = (to ^ first % 8 * 16) + first * 128;
        store_shared(at, {widen_e4m3(bytes.x), widen_e4m3(bytes.x >> 16), widen_e4m3(bytes.y),
                          widen_e4m3(bytes.y >> 16)});
        store_shared(at ^ 16, {widen_e4m3(bytes.z), widen_e4m3(bytes.z >> 16), widen_e4m3(bytes.w),
                               widen_e4m3(bytes.w >> 16)});
    }
}

// The barriers of a tile that is copied, and where it belongs.
struct Target {
    u32 tile;
    u32 full;
    u32 free;
    u32 parity;  // of the phase of `free` that makes room
};

// The copies of one warp, in order, of which the last may still be on its way. Matrix instructions may read what was
// copied only after a fence by the threads that copied it, when it is there.
template <class S>
struct Copies {
    u32 stored;        // where tiles of bytes wait
    u32 tiles = 0;     // of them, so far
    Target last = {};  // of the last copy, if it is on its way: else full = 0
    bool queries;      // whether it is of queries
    u32 waiting;       // of bytes: where

    __device__ __forceinline__ explicit Copies(u32 base) : stored(base + S::STORED) {}

    // Starts copying queries, for which there is room.
    __device__ __forceinline__ void copy_queries(const Target& to, const u8* rows, u32 row_bytes, u32 number) {
        copy_rows<S::D, ROWS>(to.tile, rows, row_bytes, number);
        started(to, true, 0);
    }
    // The same with keys or values, when there is room; bytes take it only when they are widened.
    __device__ __forceinline__ void copy_tile(const Target& to, const u8* rows, u32 row_bytes, u32 number) {
        if constexpr (S::WIDENS) {
            const u32 at = stored + tiles++ % 2 * S::STORED_BYTES;
            copy_bytes<S>(at, rows, row_bytes, number);
            started(to, false, at);
        } else {
            wait_for_room(to);
            copy_rows<S::D, S::TILE>(to.tile, rows, row_bytes, number);
            started(to, false, 0);
        }
    }
    __device__ __forceinline__ void finish() {
        if (last.full == 0) return;
        copy_async_wait<0>();
        tell();
        last.full = 0;
    }
    // If it must wait, what is on its way must not: the room may depend on it.
    __device__ __forceinline__ void wait_for_room(const Target& to) {
        if (__all_sync(ALL_LANES, barrier_test(to.free, to.parity))) return;
        finish();
        barrier_wait(to.free, to.parity);
    }

private:
    __device__ __forceinline__ void started(const Target& to, bool of_queries, u32 at) {
        copy_async_commit();
        if (last.full != 0) {
            copy_async_wait<1>();
            tell();
        }
        last = to;
        queries = of_queries;
        waiting = at;
    }
    // The last copy, or the last but the one just started, is there. Its lanes see what they copied themselves.
    __device__ __forceinline__ void tell() {
        if constexpr (!S::Kv::QUERIES_AS_THEY_ARE) {
            if (queries) round_queries<S>(last.tile);
        }
        if constexpr (S::WIDENS) {
            if (!queries) {
                barrier_wait(last.free, last.parity);
                widen_bytes<S>(last.tile, waiting);
            }
        }
        fence_async();
        barrier_arrive(last.full);
    }
};

// Where a piece of work's item is.
__device__ __forceinline__ const Words4* item_of(const Arguments& args, u32 piece) {
    return args.items + piece / args.kv_heads * 2;
}

// The warpgroup that copies.
template <class S, class Addressing>
__device__ __forceinline__ void produce(const Arguments& args, const Addressing& addressing, u32 base) {
    constexpr u32 D = S::D, TILE = S::TILE, OWN = WARP_ROWS<TILE>;
    // Of keys and values, and this lane's first in the head.
    constexpr u32 HEAD_BYTES = S::Kv::BYTES * D;
    const u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const u32 lane_byte = (S::WIDENS ? LaneBytes<D, TILE>().piece : lane % LANES_OF_ROW<D>) * 16;
    const u32 group = args.heads / args.kv_heads;
    Copies<S> copies(base);
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
            const Place<S::QUERIES> place(round);
            const Target room = {base + place.index * S::QUERY_BYTES, base + S::QUERIES_FULL + place.index * 8,
                                 base + S::QUERIES_FREE + place.index * 8, place.parity ^ 1};
            copies.wait_for_room(room);
            if (threadIdx.x == 0) {
                store_shared(S::work(base, round), head);
                store_shared(S::work(base, round) + 16, Words4{body.x, body.y, body.z, kv_head});
            }
            const u32 row = body.x + warp * WARP + lane, query = row / group;
            const u32 of_row = kv_head * group + (row - query * group);
            const u32 number = (head.y + query) * (args.heads + 2 * args.kv_heads) + of_row;
            const u8* const rows = reinterpret_cast<const u8*>(args.qkv) + lane % LANES_OF_ROW<D> * 16;
            copies.copy_queries(room, rows, 2 * D, row < head.z * group ? number : NO_SLOT);

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
        const auto copy_keys = [&](u32 slot) {
            const Place<S::STAGES> place(keys++);
            copies.copy_tile({base + S::KEYS + place.index * S::BYTES, base + S::KEYS_FULL + place.index * 8,
                              base + S::KEYS_FREE + place.index * 8, place.parity ^ 1},
                             args.keys + head_byte, slot_bytes, slot);
        };
        const auto copy_values = [&](u32 slot) {
            const Place<S::STAGES> place(values++);
            copies.copy_tile({base + S::VALUES + place.index * S::BYTES, base + S::VALUES_FULL + place.index * 8,
                              base + S::VALUES_FREE + place.index * 8, place.parity ^ 1},
                             args.values + head_byte, slot_bytes, slot);
        };
        // A tile's values are needed after the next tile's keys.
        u32 slot_before = 0;
        for (bool first = true; position < end; position += TILE, first = false) {
            const u32 slot = addressing.slot(found);
            found = find(position + TILE);
            copy_keys(slot);
            if (S::QUERIES == 1 && first) copy_queries();
            if (!first) copy_values(slot_before);
            slot_before = slot;
        }
        if (piece < args.pieces) start = __ldg(args.starts + head.x);
        copy_values(slot_before);
    }
    copies.finish();
}
