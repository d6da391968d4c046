// Attention of many queries at a time: chunks of prompts, of any length, against contexts of any length.
//
// The heads of a KV head's group are stacked: row r of a sequence is query r / group and head r % group of the group.
// One CTA computes a tile of these rows for one KV head, over all the positions that any of them sees: keys and values
// are then read once for the whole group, and little of a tile on the diagonal is computed in vain. Four warps have 16
// or 32 rows each; scores and weights never leave their registers. Tiles of keys and values lie in two buffers, so
// that one is on its way while the other is computed on.
//
// Keys and values that lie as bytes are copied as they are, and widened in a tile of their own before it is computed on.
//
// A row's sums run over tiles of fixed positions in order, and a tile it sees nothing of leaves it exactly as it was:
// its result does not depend on which rows share its CTA.
#pragma once
#include "attention.cuh"

constexpr u32 WARPS = 4;
constexpr u32 THREADS = WARPS * WARP;

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
};

// BLOCKS of 16 rows a warp, and the positions of a tile.
template <class CacheType, u32 HEAD_DIM, u32 BLOCKS_A_WARP>
struct Shape {
    using Kv = CacheType;
    static constexpr u32 D = HEAD_DIM;
    static constexpr u32 BLOCKS = BLOCKS_A_WARP;
    static constexpr u32 ROWS = WARPS * BLOCKS * 16;
    static constexpr u32 TILE = D <= 128 ? 64 : 32;
    using Row = HeadRow<2, D>;  // of queries, and of what is multiplied
    static constexpr u32 STRIDE = Row::STRIDE;
    static constexpr u32 QUERY_BYTES = ROWS * STRIDE;
    static constexpr bool WIDENS = Kv::BYTES == 1;
    // As it comes from the cache. What is widened is read row after row: it needs nothing between rows.
    using Stored = HeadRow<Kv::BYTES, D, !WIDENS>;
    static constexpr u32 STORED_BYTES = TILE * Stored::STRIDE;  // of keys, and again of values
};

// One CTA's rows.
struct Task {
    Words4 head;
    Words4 body;
    u32 kv_head;
    u32 group;
    u32 all_rows;

    __device__ __forceinline__ Task(const Arguments& args)
        : head(args.items[blockIdx.x / args.kv_heads * 2]),
          body(args.items[blockIdx.x / args.kv_heads * 2 + 1]),
          kv_head(blockIdx.x % args.kv_heads),
          group(args.heads / args.kv_heads) {
        all_rows = head.z * group;
    }
    __device__ __forceinline__ bool exists(u32 row) const { return body.x + row < all_rows; }
    // Position of a row; those past the last are taken for the last.
    __device__ __forceinline__ u32 position(u32 row) const {
        return head.w - head.z + min(body.x + row, all_rows - 1) / group;
    }
    // Row and head of a row, as an index of [rows][heads_per_row].
    __device__ __forceinline__ u64 at(u32 row, u32 heads_per_row) const {
        const u32 query = (body.x + row) / group;
        return u64(head.y + query) * heads_per_row + kv_head * group + (body.x + row - query * group);
    }
};

// A warp copies its own rows of queries, or starts to; rows that do not exist become zero.
template <class S>
__device__ __forceinline__ void copy_queries(u32 to, const Arguments& args, const Task& task, u32 first_row) {
    // One at a time where halves are rounded to bfloat16: with more, the largest tile spills registers.
    constexpr int AT_ONCE = ACTIVATIONS_ARE_F16 && !S::Kv::QUERIES_AS_THEY_ARE ? 1 : 4;
#pragma unroll AT_ONCE
    for (u32 i = 0; i < S::BLOCKS * 16 * S::Row::PIECES / WARP; ++i) {
        const u32 unit = i * WARP + threadIdx.x % WARP;
        const u32 row = unit / S::Row::PIECES, piece = unit % S::Row::PIECES;
        const bool exists = task.exists(first_row + row);
        const u64 at = task.at(exists ? first_row + row : 0, args.heads + 2 * args.kv_heads) * S::D + piece * 8;
        const u32 target = to + row * S::STRIDE + piece * 16;
        if constexpr (S::Kv::QUERIES_AS_THEY_ARE) {
            copy_async_16(target, args.qkv + at, exists);
        } else {
            Words4 words = {0, 0, 0, 0};
            if (exists) words = *reinterpret_cast<const Words4*>(args.qkv + at);
            store_shared(target, {S::Kv::query(words.x), S::Kv::query(words.y), S::Kv::query(words.z),
                                  S::Kv::query(words.w)});
        }
    }
}

// Widens a tile of keys and of values, by all threads.
template <class S>
__device__ __forceinline__ void widen_tile(u32 to, u32 from) {
    constexpr u32 UNITS = S::D / 8;  // of 8 bytes
#pragma unroll 2
    for (u32 unit = threadIdx.x; unit < 2 * S::TILE * UNITS; unit += THREADS) {
        const u32 row = unit / UNITS, at = unit % UNITS;
        uint2 bytes;
        asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];"
                     : "=r"(bytes.x), "=r"(bytes.y)
                     : "r"(from + row * S::Stored::STRIDE + at * 8)
                     : "memory");
        store_shared(to + row * S::STRIDE + at * 16, {widen_e4m3(bytes.x), widen_e4m3(bytes.x >> 16),
                                                      widen_e4m3(bytes.y), widen_e4m3(bytes.y >> 16)});
    }
}

// Scores of a warp's rows against a tile of keys; both addresses are this lane's.
template <class S>
__device__ __forceinline__ void score(float (&scores)[S::BLOCKS][S::TILE / 8][4], u32 queries, u32 keys) {
#pragma unroll
    for (u32 b = 0; b < S::BLOCKS; ++b)
#pragma unroll
        for (u32 j = 0; j < S::TILE / 8; ++j)
#pragma unroll
            for (u32 i = 0; i < 4; ++i) scores[b][j][i] = 0.0f;
#pragma unroll
    for (u32 k = 0; k < S::D / 16; ++k) {
        u32 q[S::BLOCKS][4];
#pragma unroll
        for (u32 b = 0; b < S::BLOCKS; ++b) load_tiles(q[b], queries + b * 16 * S::STRIDE + k * 32);
#pragma unroll
        for (u32 j = 0; j < S::TILE / 16; ++j) {
            u32 key[4];
            load_tiles(key, keys + j * 16 * S::STRIDE + k * 32);
#pragma unroll
            for (u32 b = 0; b < S::BLOCKS; ++b) {
                S::Kv::multiply(scores[b][2 * j], q[b], key[0], key[1]);
                S::Kv::multiply(scores[b][2 * j + 1], q[b], key[2], key[3]);
            }
        }
    }
}

// What this lane's two rows of a block see. Found anew where it is needed, in few tiles: registers are scarcer.
__device__ __forceinline__ Visible visible_rows(const Task& task, u32 first_row, u32 window) {
    Visible visible;
#pragma unroll
    for (u32 half = 0; half < 2; ++half) {
        const u32 position = task.position(first_row + threadIdx.x % WARP / 4 + 8 * half);
        visible.low[half] = window_start(position, window);
        visible.high[half] = position + 1;
    }
    return visible;
}

// Divides by the sums of weights and writes the warp's rows, by way of the shared memory that held its queries, so that
// whole rows are written.
template <class S>
__device__ __forceinline__ void store_rows(u32 address, const u8* memory, const Arguments& args, const Task& task,
                                           u32 first_row, float (&acc)[S::BLOCKS][S::D / 8][4],
                                           const Softmax (&softmax)[S::BLOCKS]) {
    const u32 lane = threadIdx.x % WARP;
    __syncwarp();
#pragma unroll
    for (u32 b = 0; b < S::BLOCKS; ++b)
#pragma unroll
        for (u32 half = 0; half < 2; ++half) {
            const float factor = 1.0f / quad_sum(softmax[b].sum[half]);
            const u32 row = address + (b * 16 + lane / 4 + 8 * half) * S::STRIDE + lane % 4 * 4;
#pragma unroll
            for (u32 j = 0; j < S::D / 8; ++j) {
                const float(&c)[4] = acc[b][j];
                const u32 packed = pack(c[2 * half] * factor, c[2 * half + 1] * factor);
                asm volatile("st.shared.u32 [%0], %1;" ::"r"(row + 16 * j), "r"(packed) : "memory");
            }
        }
    __syncwarp();
#pragma unroll 4
    for (u32 i = 0; i < S::BLOCKS * 16 * S::Row::PIECES / WARP; ++i) {
        const u32 unit = i * WARP + lane;
        const u32 row = unit / S::Row::PIECES, piece = unit % S::Row::PIECES;
        if (!task.exists(first_row + row)) continue;
        u16* const to = args.out + task.at(first_row + row, args.heads) * S::D + piece * 8;
        *reinterpret_cast<Words4*>(to) = *reinterpret_cast<const Words4*>(memory + row * S::STRIDE + piece * 16);
    }
}

template <class S, class Addressing>
__device__ __forceinline__ void prefill(const Arguments& args, const Addressing& addressing) {
    constexpr u32 WARP_POSITIONS = S::TILE / WARPS;  // whose keys and values one warp copies
    extern __shared__ __align__(16) u8 memory[];
    // First entry and first position. Needed once a tile, by the look-up of the next: kept here, because every register
    // is taken. Beside the longest heads' tiles some cards have no shared memory left but what separates the rows of
    // queries.
    static_assert(S::Row::STRIDE > S::Row::PIECES * 16, "the first row of queries is followed by 16 bytes of nothing");
    __shared__ uint2 room;
    uint2& kept = S::D > 128 ? *reinterpret_cast<uint2*>(memory + S::Row::PIECES * 16) : room;
    const Task task(args);
    const u32 warp = threadIdx.x / WARP;
    const u32 first_row = warp * S::BLOCKS * 16;  // of this warp, in the CTA's tile
    const u32 own = first_row * S::STRIDE;
    const u32 queries = shared_address(memory) + own;
    const u32 buffers = shared_address(memory) + S::QUERY_BYTES;
    const HeadCache cache = HeadCache::of<typename S::Kv, S::D>(args.keys, args.values, args.kv_heads, task.kv_head);
    const u32 end = task.body.z;

    const auto find = [&](uint2 from, u32 position) {
        return look_up<WARP_POSITIONS>(addressing, from.x, position + warp * WARP_POSITIONS, from.y, end);
    };
    const auto copy_tile = [&](u32 buffer, const Lookup& found) {
        const u32 to = buffers + buffer * (2 * S::STORED_BYTES) + warp * WARP_POSITIONS * S::Stored::STRIDE;
        copy_rows<typename S::Stored, WARP_POSITIONS>(to, to + S::STORED_BYTES, cache, addressing.slot(found));
    };
    u32 position = task.body.y / S::TILE * S::TILE;
    const uint2 from = make_uint2(args.starts[task.head.x], task.body.y);
    if (threadIdx.x == 0) kept = from;
    Lookup found = find(from, position);
    copy_queries<S>(queries, args, task, first_row);
    copy_tile(0, found);
    copy_async_commit();
    found = find(from, position + S::TILE);

    float acc[S::BLOCKS][S::D / 8][4] = {};
    Softmax softmax[S::BLOCKS];
    // Position of this warp's first row, and one past that of its last; zero for a warp that has no rows.
    const u32 earliest = task.position(first_row);
    const u32 seen_to = task.exists(first_row) ? task.position(first_row + S::BLOCKS * 16 - 1) + 1 : 0;
    for (u32 buffer = 0; position < end; position += S::TILE, buffer ^= 1) {
        // This tile is there, and all warps are done with the one before, whose buffer is filled next.
        copy_async_wait<0>();
        __syncthreads();
        if (position + S::TILE < end) {
            copy_tile(buffer ^ 1, found);
            copy_async_commit();
            found = find(kept, position + 2 * S::TILE);
        }
        u32 keys = buffers + buffer * (2 * S::STORED_BYTES);
        if constexpr (S::WIDENS) {
            keys = buffers + 2 * (2 * S::STORED_BYTES);
            widen_tile<S>(keys, buffers + buffer * (2 * S::STORED_BYTES));
            __syncthreads();
        }
        const u32 values = keys + S::TILE * S::STRIDE;
        // Nothing that any row of this warp sees?
        if (position >= seen_to || position + S::TILE <= window_start(earliest, args.window)) continue;
        float scores[S::BLOCKS][S::TILE / 8][4];
        score<S>(scores, queries + lane_offset_by_column<S::STRIDE>(),
                          keys + lane_offset_by_row<S::STRIDE>());
        // Something that not all of them see?
        if (position < window_start(seen_to - 1, args.window) || position + S::TILE > earliest + 1) {
#pragma unroll
            for (u32 b = 0; b < S::BLOCKS; ++b)
                hide(scores[b], visible_rows(task, first_row + b * 16, args.window), position);
        }
#pragma unroll
        for (u32 b = 0; b < S::BLOCKS; ++b) weigh(scores[b], acc[b], softmax[b], args.scale_log2);
        add_values<typename S::Kv, S::STRIDE>(acc, scores, values + lane_offset_by_column<S::STRIDE>());
    }
    store_rows<S>(queries, memory + own, args, task, first_row, acc, softmax);
}

// KV names what the cache holds in the kernels' names, NUMBER is its type.
#define PREFILL(KV, NUMBER, D, ROWS, NAME, ADDRESSING)                                                              \
    extern "C" __global__ void __launch_bounds__(THREADS, 2) attention_prefill_##KV##_d##D##_r##ROWS##_##NAME(      \
        u16* out, const u16* qkv, const u8* keys, const u8* values, const u32* tables, const u32* starts,           \
        const Words4* items, u32 heads, u32 kv_heads, u32 block_size, u32 window, float scale) {                    \
        const Arguments args = {out,   qkv,   keys,     values, starts,                                             \
                                items, heads, kv_heads, window, scale * LOG2_E};                                    \
        prefill<Shape<NUMBER, D, ROWS / 64>>(args, ADDRESSING(tables, block_size));                                 \
    }

#define PREFILL_BOTH(KV, NUMBER, D, ROWS)      \
    PREFILL(KV, NUMBER, D, ROWS, paged, Paged) \
    PREFILL(KV, NUMBER, D, ROWS, contiguous, Contiguous)

#define PREFILL_SMALL(KV, NUMBER)       \
    PREFILL_BOTH(KV, NUMBER, 64, 64)    \
    PREFILL_BOTH(KV, NUMBER, 80, 64)    \
    PREFILL_BOTH(KV, NUMBER, 96, 64)    \
    PREFILL_BOTH(KV, NUMBER, 128, 64)   \
    PREFILL_BOTH(KV, NUMBER, 256, 64)

#define PREFILL_LARGE(KV, NUMBER)     \
    PREFILL_BOTH(KV, NUMBER, 64, 128) \
    PREFILL_BOTH(KV, NUMBER, 80, 128) \
    PREFILL_BOTH(KV, NUMBER, 96, 128)
