// A row of logits in chunks: how a warp holds one, what is known of one, and of the row by all of them.
#pragma once
#include "common.cuh"

constexpr u32 CHUNK = 1024;           // Logits that a warp holds, 32 a lane.
constexpr u32 RUN = 4 * WARP;         // Consecutive logits that a warp reads at once, 4 a lane.
constexpr u32 RUNS = CHUNK / RUN;
constexpr u32 HELD = CHUNK / WARP;
constexpr u32 FULL = 0xFFFFFFFFu;
constexpr float LOG2_E = 1.44269504f, FLOAT_MAX = 3.40282347e38f;

// What is known of a chunk: its greatest logit, the lowest id that has it, the sum of e^(logit - greatest).
struct alignas(16) ChunkStats {
    float greatest, sum;
    u32 first, unused;
};

struct RowStats {
    float greatest, log_sum;
    u32 first;
};

__device__ __forceinline__ u32 lane_id() { return threadIdx.x % WARP; }
__device__ __forceinline__ u32 warp_id() { return threadIdx.x / WARP; }

// Zeros of both signs become one, so that equal logits have equal keys.
__device__ __forceinline__ float clean(float x) { return fminf(fmaxf(x, NEG_INFINITY), FLOAT_MAX) + 0.0f; }

// A key that orders as the floats do.
__device__ __forceinline__ u32 ordered(float x) {
    const u32 bits = __float_as_uint(x);
    return bits ^ (bits >> 31 != 0 ? FULL : 0x80000000u);
}
__device__ __forceinline__ float unordered(u32 key) {
    return __uint_as_float(key ^ (key >> 31 != 0 ? 0x80000000u : FULL));
}

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ u32 id_of(u32 first_id, u32 held) {
    return first_id + held / 4 * RUN + lane_id() * 4 + held % 4;
}

// A chunk of a row, cleaned; minus infinity past its end.
__device__ __forceinline__ void load_chunk(const float* row, u32 first_id, u32 vocab, float (&x)[HELD]) {
    if (vocab % 4 == 0) {
#pragma unroll
        for (u32 i = 0; i < HELD; i += 4) {
            float4 four = make_float4(NEG_INFINITY, NEG_INFINITY, NEG_INFINITY, NEG_INFINITY);
            const u32 id = id_of(first_id, i);
            if (id < vocab) four = *reinterpret_cast<const float4*>(row + id);
            x[i] = four.x, x[i + 1] = four.y, x[i + 2] = four.z, x[i + 3] = four.w;
        }
    } else {
#pragma unroll
        for (u32 i = 0; i < HELD; ++i) {
            const u32 id = id_of(first_id, i);
            x[i] = id < vocab ? row[id] : NEG_INFINITY;
        }
    }
#pragma unroll
    for (u32 i = 0; i < HELD; ++i) x[i] = clean(x[i]);
}

__device__ __forceinline__ ChunkStats chunk_stats(const float (&x)[HELD], u32 first_id, bool sums) {
    float greatest = x[0];
#pragma unroll
    for (u32 i = 1; i < HELD; ++i) greatest = fmaxf(greatest, x[i]);
    greatest = unordered(__reduce_max_sync(FULL, ordered(greatest)));
    u32 first = FULL;
#pragma unroll
    for (u32 i = HELD; i > 0; --i) first = x[i - 1] == greatest ? id_of(first_id, i - 1) : first;
    first = __reduce_min_sync(FULL, first);
    float sum[4] = {};
    if (sums && greatest > NEG_INFINITY) {
#pragma unroll
        for (u32 i = 0; i < HELD; ++i) sum[i % 4] += exp2_fast((x[i] - greatest) * LOG2_E);
    }
    return {greatest, warp_sum((sum[0] + sum[1]) + (sum[2] + sum[3])), first, 0};
}

// Combines a row's chunks, which `get` gives. By a whole warp.
template <typename Get>
__device__ __forceinline__ RowStats row_stats(u32 chunks, Get get) {
    float greatest = NEG_INFINITY, sum = 0.0f;
    u32 first = 0;
    for (u32 i = lane_id(); i < chunks; i += WARP) {
        const ChunkStats chunk = get(i);
        if (chunk.greatest > greatest) {
            sum = sum * exp2_fast((greatest - chunk.greatest) * LOG2_E) + chunk.sum;
            greatest = chunk.greatest;
            first = chunk.first;
        } else if (chunk.greatest > NEG_INFINITY) {
            sum += chunk.sum * exp2_fast((chunk.greatest - greatest) * LOG2_E);
        }
    }
    const float most = unordered(__reduce_max_sync(FULL, ordered(greatest)));
    // A row of nothing but minus infinity: token 0.
    first = __reduce_min_sync(FULL, greatest == most ? first : FULL);
    const float total = warp_sum(greatest > NEG_INFINITY ? sum * exp2_fast((greatest - most) * LOG2_E) : 0.0f);
    return {most, logf(total), first};
}

__device__ __forceinline__ float log_probability(float logit, const RowStats& row) {
    return row.greatest > NEG_INFINITY ? logit - row.greatest - row.log_sum : NEG_INFINITY;
}
