// The most probable tokens of a row, in order, with their log-probabilities.
#pragma once
#include "sampling_logits.cuh"

constexpr u32 TOP_WARPS = 16;
constexpr u32 TOP_CHUNKS = 1024;      // Of the longest row: a vocabulary has fewer than 2^20 tokens.

// What is wanted of one row: `count` tokens, at most the vocabulary, written as (token, log-probability) from word `at` on.
struct alignas(16) TopRow {
    u32 row, count, at, unused;
};

// Orders tokens: the greater logit first, of equal ones the lower id. Zero is below all.
__device__ __forceinline__ u64 rank_of(float x, u32 id) { return u64(ordered(x)) << 32 | (FULL - id); }

__device__ __forceinline__ u64 warp_max_u64(u64 x) {
    for (u32 lane = WARP / 2; lane > 0; lane /= 2) x = max(x, __shfl_xor_sync(FULL, x, lane));
    return x;
}

// The greatest rank below `bound` in a chunk, or zero. By a whole warp.
__device__ __forceinline__ u64 best_below(const float* row, u32 first_id, u32 vocab, u64 bound) {
    float x[HELD];
    load_chunk(row, first_id, vocab, x);
    u64 best = 0;
#pragma unroll
    for (u32 i = 0; i < HELD; ++i) {
        const u32 id = id_of(first_id, i);
        const u64 rank = id < vocab ? rank_of(x[i], id) : 0;
        if (rank < bound) best = max(best, rank);
    }
    return warp_max_u64(best);
}

// A tournament: the best of each chunk are found by all warps; then one warp takes the best of all and looks in its chunk for
// the next, as often as tokens are wanted. Only that chunk is read again, from the second-level cache.
extern "C" __global__ void __launch_bounds__(TOP_WARPS* WARP)
    sample_top(const float* __restrict__ logits, const TopRow* __restrict__ wanted, u32* __restrict__ found, u32 vocab) {
    __shared__ ChunkStats known[TOP_CHUNKS];
    __shared__ u64 best[TOP_CHUNKS];
    const TopRow want = wanted[blockIdx.x];
    const u32 chunks = (vocab + CHUNK - 1) / CHUNK;
    logits += u64(want.row) * vocab;
    for (u32 chunk = warp_id(); chunk < chunks; chunk += TOP_WARPS) {
        float x[HELD];
        load_chunk(logits, chunk * CHUNK, vocab, x);
        const ChunkStats stats = chunk_stats(x, chunk * CHUNK, true);
        if (lane_id() == 0) known[chunk] = stats, best[chunk] = rank_of(stats.greatest, stats.first);
    }
    __syncthreads();
    if (warp_id() != 0) return;
    const RowStats row = row_stats(chunks, [&](u32 i) { return known[i]; });
    for (u32 i = 0; i < want.count; ++i) {
        u64 rank = 0;
        for (u32 chunk = lane_id(); chunk < chunks; chunk += WARP) rank = max(rank, best[chunk]);
        rank = warp_max_u64(rank);
        const u32 token = FULL - u32(rank), chunk = token / CHUNK;
        if (lane_id() == 0) {
            found[want.at + 2 * i] = token;
            found[want.at + 2 * i + 1] = __float_as_uint(log_probability(unordered(u32(rank >> 32)), row));
        }
        const u64 next = best_below(logits, chunk * CHUNK, vocab, rank);
        if (lane_id() == 0) best[chunk] = next;
        __syncwarp();
    }
}
