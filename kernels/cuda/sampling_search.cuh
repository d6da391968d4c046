// Searches of a row by the cluster of blocks that holds it: for the logit at which a sum from the greatest down reaches
// a target (top-k and top-p), and for the id at which a sum in the order of ids exceeds an index (the draw).
#pragma once
#include "sampling_logits.cuh"

constexpr u32 THREADS = 512;
constexpr u32 WARPS = THREADS / WARP;
constexpr u32 BINS = 2048;            // Of a histogram over 11 bits of the logits' keys.
constexpr u32 GROUPS = BINS / WARP;

// A row falls to one cluster, whose blocks' shared memory holds it together: it is read from global memory once.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr u32 CLUSTER = 8, BLOCKS_PER_SM = 2;
#define QUIRE_CLUSTER __cluster_dims__(CLUSTER, 1, 1)
#else
constexpr u32 CLUSTER = 1, BLOCKS_PER_SM = 1;
#define QUIRE_CLUSTER
#endif

// All threads of the row's blocks; what they wrote to shared memory before is visible after.
__device__ __forceinline__ void cluster_sync() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release;\n\tbarrier.cluster.wait.acquire;" ::: "memory");
#else
    __syncthreads();
#endif
}

__device__ __forceinline__ u32 cluster_rank() { return blockIdx.x % CLUSTER; }

// What block `rank` of the cluster has where this one has `mine`, which lies in shared memory.
__device__ __forceinline__ uint2 peer(const void* mine, u32 rank) {
    uint2 words;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile(
        "{\n\t.reg .u32 address;\n\t"
        "mapa.shared::cluster.u32 address, %2, %3;\n\t"
        "ld.shared::cluster.v2.u32 {%0, %1}, [address];\n\t}"
        : "=r"(words.x), "=r"(words.y)
        : "r"(shared_address(mine)), "r"(rank)
        : "memory");
#else
    words = *static_cast<const uint2*>(mine);
#endif
    return words;
}
__device__ __forceinline__ u64 peer_u64(const u64* mine, u32 rank) {
    const uint2 words = peer(mine, rank);
    return u64(words.y) << 32 | words.x;
}

// What one warp found for its block.
struct Found {
    u64 target, before, at;
    u32 bin, chunk, id;
};

// A block's part of a row, and its scratch, all in shared memory but perhaps `values`.
struct Block {
    float* values;
    u64* bins;
    u64* groups;
    ChunkStats* given;
    ChunkStats* penalized;
    u64* sums;
    Found* found;
    u32 first, chunks, row_chunks, per_block;
};

__device__ __forceinline__ u64 warp_sum_u64(u64 x) {
    for (u32 lane = WARP / 2; lane > 0; lane /= 2) x += __shfl_xor_sync(FULL, x, lane);
    return x;
}

// Sums of the lanes up to and including each.
__device__ __forceinline__ u64 warp_scan(u64 x) {
    for (u32 distance = 1; distance < WARP; distance *= 2) {
        const u64 below = __shfl_up_sync(FULL, x, distance);
        if (lane_id() >= distance) x += below;
    }
    return x;
}

// The first lane for which `here` holds; the last if none does.
__device__ __forceinline__ u32 first_lane(bool here) {
    const u32 lanes = __ballot_sync(FULL, here);
    return lanes == 0 ? WARP - 1 : u32(__ffs(int(lanes))) - 1;
}

template <typename F>
__device__ __forceinline__ void for_chunk(const Block& block, u32 chunk, F f) {
    const u32 first_id = (block.first + chunk) * CHUNK;
#pragma unroll 1
    for (u32 run = 0; run < RUNS; ++run) {
        const u32 at = run * RUN + lane_id() * 4;
        const float4 four = *reinterpret_cast<const float4*>(block.values + chunk * CHUNK + at);
        f(four.x, first_id + at);
        f(four.y, first_id + at + 1);
        f(four.z, first_id + at + 2);
        f(four.w, first_id + at + 3);
    }
}

// Adds to a 64-bit sum by 32-bit atomics, which shared memory has: whoever makes the lower half wrap carries.
__device__ __forceinline__ void add_to(u64* sum, u64 value) {
    u32* halves = reinterpret_cast<u32*>(sum);
    const u32 low = u32(value);
    u32 high = u32(value >> 32);
    if (low != 0 && atomicAdd(&halves[0], low) + low < low) ++high;
    if (high != 0) atomicAdd(&halves[1], high);
}
// Counts stay below 2^32.
__device__ __forceinline__ void add_to(u64* sum, u32 count) { atomicAdd(reinterpret_cast<u32*>(sum), count); }

// The key at which the sum of `value(logit, key)` over the logits of keys from it up reaches a target, the part of the
// target that falls to this key, and the sum over the logits of this key. Three digits of the key, by histogram.
// `value` must be zero below `floor`; `target_of` gives the target, at least 1 and at most the total it is given.
struct Threshold {
    u32 key;
    u64 left, at;
};
template <typename Value, typename Target>
__device__ __forceinline__ Threshold select(const Block& block, u32 floor, Value value, Target target_of) {
    u32 prefix = 0;
    u64 target = 0, at = 0;
#pragma unroll 1
    for (u32 level = 0; level < 3; ++level) {
        const u32 bits = level < 2 ? 11 : 10, shift = level == 0 ? 21 : level == 1 ? 10 : 0;
        cluster_sync();  // No block reads the last histograms any more.
        for (u32 i = threadIdx.x; i < BINS; i += THREADS) block.bins[i] = 0;
        __syncthreads();
        for (u32 chunk = warp_id(); chunk < block.chunks; chunk += WARPS) {
            for_chunk(block, chunk, [&](float x, u32) {
                const u32 key = ordered(x);
                if (key < floor || u64(key) >> (shift + bits) != prefix) return;
                add_to(&block.bins[key >> shift & ((1u << bits) - 1)], value(x));
            });
        }
        __syncthreads();
        for (u32 group = warp_id(); group < GROUPS; group += WARPS) {
            const u64 sum = warp_sum_u64(block.bins[group * WARP + lane_id()]);
            if (lane_id() == 0) block.groups[group] = sum;
        }
        cluster_sync();
        if (warp_id() == 0) {
            // From the greatest down: two groups a lane, then a bin of the group a lane.
            const u32 group = GROUPS - 1 - 2 * lane_id();
            u64 upper = 0, lower = 0;
#pragma unroll
            for (u32 rank = 0; rank < CLUSTER; ++rank) {
                upper += peer_u64(&block.groups[group], rank);
                lower += peer_u64(&block.groups[group - 1], rank);
            }
            const u64 groups = warp_scan(upper + lower);
            if (level == 0) target = target_of(__shfl_sync(FULL, groups, WARP - 1));
            const u32 lane = first_lane(groups >= target);
            const u64 above = groups - upper - lower;
            const bool second = above + upper < target;
            const u64 before_group = __shfl_sync(FULL, second ? above + upper : above, lane);
            const u32 bin = __shfl_sync(FULL, second ? group - 1 : group, lane) * WARP + WARP - 1 - lane_id();
            u64 mine = 0;
#pragma unroll
            for (u32 rank = 0; rank < CLUSTER; ++rank) mine += peer_u64(&block.bins[bin], rank);
            const u64 upto = before_group + warp_scan(mine);
            if (lane_id() == first_lane(upto >= target)) *block.found = {target, upto - mine, mine, bin, 0, 0};
        }
        __syncthreads();
        target = block.found->target - block.found->before;
        at = block.found->at;
        prefix = prefix << bits | block.found->bin;
    }
    return {prefix, target, at};
}

// Among values in the order of ids: where the sum first exceeds an index that `index_of` gives, below the total it is
// given. All blocks learn the chunk; the block that has it, the id too, and the others FULL.
template <typename Value, typename Index>
__device__ __forceinline__ void find(const Block& block, Value value, Index index_of) {
    cluster_sync();  // No block reads the last sums any more.
    for (u32 chunk = warp_id(); chunk < block.chunks; chunk += WARPS) {
        u64 sum = 0;
        for_chunk(block, chunk, [&](float x, u32 id) { sum += value(x, id); });
        sum = warp_sum_u64(sum);
        if (lane_id() == 0) block.sums[chunk] = sum;
    }
    cluster_sync();
    if (warp_id() == 0) {
        const auto sum_of = [&](u32 i) { return peer_u64(&block.sums[i % block.per_block], i / block.per_block); };
        const u32 each = (block.row_chunks + WARP - 1) / WARP;
        const u32 end = min((lane_id() + 1) * each, block.row_chunks);
        u32 chunk = min(lane_id() * each, block.row_chunks), id = FULL;
        u64 mine = 0;
        for (u32 i = chunk; i < end; ++i) mine += sum_of(i);
        const u64 upto = warp_scan(mine);
        const u64 index = index_of(__shfl_sync(FULL, upto, WARP - 1));
        const u32 lane = first_lane(upto > index);
        u64 left = index - (upto - mine);
        if (lane_id() == lane) {
            for (; chunk + 1 < end; ++chunk) {
                const u64 sum = sum_of(chunk);
                if (left < sum) break;
                left -= sum;
            }
        }
        chunk = __shfl_sync(FULL, chunk, lane);
        left = __shfl_sync(FULL, left, lane);
        if (chunk - block.first < block.chunks) {
            const float* values = block.values + (chunk - block.first) * CHUNK;
#pragma unroll 1
            for (u32 at = lane_id() * 4; at < CHUNK && id == FULL; at += RUN) {
                u64 v[4], run = 0;
#pragma unroll
                for (u32 i = 0; i < 4; ++i) run += v[i] = value(values[at + i], chunk * CHUNK + at + i);
                const u64 runs = warp_scan(run), total = __shfl_sync(FULL, runs, WARP - 1);
                const u32 hit = first_lane(runs > left);
                if (left < total) {
                    u64 rest = left - (runs - run);
                    u32 skipped = 0;
#pragma unroll
                    for (u32 i = 0; i < 3; ++i) {
                        if (skipped == i && rest >= v[i]) rest -= v[i], ++skipped;
                    }
                    id = __shfl_sync(FULL, chunk * CHUNK + at + skipped, hit);
                }
                left -= total;
            }
        }
        if (lane_id() == 0) block.found->chunk = chunk, block.found->id = id;
    }
    __syncthreads();
}
