// What the warpgroups of attention_prefill_hopper.cuh agree on: arguments, which work a CTA takes in which round, and
// what lies where in shared memory.
//
// Queries, keys and values lie in shared memory as the matrix instructions want them: each 64 columns (128 bytes) of a
// tile are an array of their own, of all its rows one after another, in which the 16-byte piece c of row r is at piece
// c ^ (r % 8). Heads of 80 and 96 elements take a part of each row of their second array, and nothing is done with the
// rest. Arrays start at multiples of 1024 bytes, so that this exclusive or is one of address bits.
#pragma once
#include "attention.cuh"

constexpr u32 WARPGROUP = 4 * WARP;
constexpr u32 CONSUMERS = 2;  // warpgroups that compute
constexpr u32 THREADS = (1 + CONSUMERS) * WARPGROUP;

constexpr u32 CONSUMER_WARPS = CONSUMERS * WARPGROUP / WARP;
constexpr u32 PRODUCER_WARPS = WARPGROUP / WARP;
constexpr u32 ROWS = CONSUMERS * 64;  // of queries; as the planner knows

// Bytes of 64 columns of a tile of so many rows.
template <u32 TILE_ROWS>
constexpr u32 SPAN = TILE_ROWS * 128;
// Rows of a tile that one warp copies.
template <u32 TILE_ROWS>
constexpr u32 WARP_ROWS = TILE_ROWS / PRODUCER_WARPS;
static_assert(WARP_ROWS<ROWS> == WARP, "a lane finds one row of queries");

struct Arguments {
    u16* out;          // [rows][heads][D]
    const u16* qkv;    // [rows][heads + 2 kv_heads][D]
    const u8* keys;    // [slots][kv_heads][D], of the type that the cache holds
    const u8* values;
    const u32* starts;    // first table entry, or first slot, of each sequence
    const Words4* items;  // two each: (sequence, first query row, queries, context), (first row, first, end, unused)
    u32 heads;
    u32 kv_heads;
    u32 window;
    float scale_log2;
    u32 pieces;  // of work: items times KV heads
};

// Lanes that take a row's pieces of 16 bytes, one each: a power of two, so that some may have none. The same of a row
// of bytes.
template <u32 D>
constexpr u32 LANES_OF_ROW = D > 128 ? 32 : D > 64 ? 16 : 8;
template <u32 D>
constexpr u32 LANES_OF_STORED_ROW = LANES_OF_ROW<D> / 2;

// What lies where in shared memory, from a multiple of 1024 bytes on. The launch reserves 1024 + END bytes.
template <class CacheType, u32 HEAD_DIM>
struct Shape {
    using Kv = CacheType;
    static constexpr u32 D = HEAD_DIM;
    static constexpr u32 SPANS = (D + 63) / 64;
    // The longest heads leave registers for the scores of half as many positions, and shared memory for one tile of
    // queries: an item's come when those of the item before have been read.
    static constexpr u32 TILE = D > 128 ? 64 : 128;      // positions
    static constexpr u32 QUERIES = D > 128 ? 1 : 2;      // tiles of them
    static constexpr u32 STAGES = D > 64 ? 2 : 4;        // of keys, and of values; a power of two
    static constexpr u32 QUERY_BYTES = SPANS * SPAN<ROWS>;  // a tile of queries
    static constexpr u32 BYTES = SPANS * SPAN<TILE>;        // a tile of keys, or of values
    static constexpr u32 KEYS = QUERIES * QUERY_BYTES;      // after the queries
    static constexpr u32 VALUES = KEYS + STAGES * BYTES;
    // Tiles of bytes as they come: one on its way while the one before it is widened. Each lane has its pieces in the
    // order in which it copied them, warp after warp.
    static constexpr bool WIDENS = Kv::BYTES == 1;
    static constexpr u32 STORED = VALUES + STAGES * BYTES;
    static constexpr u32 STORED_BYTES = WIDENS ? TILE * LANES_OF_STORED_ROW<D> * 16 : 0;
    // Of the 504 that a thread of each warpgroup has together. Shorter heads leave some, and widening rows whose pieces
    // are no power of two takes more.
    static constexpr u32 PRODUCER_REGISTERS = WIDENS && D <= 96 ? 72 : 56;
    static constexpr u32 CONSUMER_REGISTERS = (504 - PRODUCER_REGISTERS) / 2;
    static constexpr u32 WORK = STORED + 2 * STORED_BYTES;  // two Words4 for each item
    // Items that warps may be at: one may be at the rows of an item whose queries have been read when others are at the
    // item after the next.
    static constexpr u32 ITEMS = 4;
    static constexpr u32 BARRIERS = WORK + ITEMS * 32;
    // Barriers: something is there, and room is there.
    //
    // Every lane arrives for itself where it wrote or read shared memory itself: racecheck does not take one arrival per warp
    // after __syncwarp for an order. For keys and values that matrix instructions have read, one lane of each warp arrives.
    static constexpr u32 QUERIES_FULL = BARRIERS, QUERIES_FREE = QUERIES_FULL + QUERIES * 8;
    static constexpr u32 KEYS_FULL = QUERIES_FREE + QUERIES * 8, KEYS_FREE = KEYS_FULL + STAGES * 8;
    static constexpr u32 VALUES_FULL = KEYS_FREE + STAGES * 8, VALUES_FREE = VALUES_FULL + STAGES * 8;
    static constexpr u32 END = VALUES_FREE + STAGES * 8;
    static_assert(1024 + END <= 227 * 1024, "what a CTA may have");

    // Where the item of a round is described.
    static __device__ __forceinline__ u32 work(u32 base, u32 round) { return base + WORK + round % ITEMS * 32; }
};

// The piece of work of a CTA in round `round`.
__device__ __forceinline__ u32 piece_of(u32 round) {
    return round * gridDim.x + (round % 2 == 0 ? blockIdx.x : gridDim.x - 1 - blockIdx.x);
}

// Which of COUNT places the n-th use of a ring falls on, and the parity of the phase that its being there completes.
template <u32 COUNT>
struct Place {
    u32 index;
    u32 parity;
    __device__ __forceinline__ Place(u32 n) : index(n % COUNT), parity(n / COUNT % 2) {}
};
