// Attention of many queries at a time on compute capability 9.0: the work of attention_prefill.cuh, by warpgroup matrix
// instructions.
//
// Rows are stacked as there (row r of a sequence is query r / group and head r % group of the group), in tiles of 128.
// CTAs stay: each takes every gridDim.x-th piece of work (an item and a KV head), every other time from the other end,
// so that sorted work is dealt out evenly. Of three warpgroups, the first copies: queries into one or two buffers, tiles
// of keys and values into two rings, always as far ahead as there is room, over the bounds of items; what lies as bytes
// in the cache it widens on the way, and queries it rounds where they are not what is multiplied. The others compute 64
// rows each. While the tensor cores multiply a tile of queries and keys, and the weights and values of the tile
// before it (perhaps of the item before), for one warpgroup, the other makes weights of its scores; they take turns.
//
// A row's sums run over tiles of fixed positions in order, and a tile it sees nothing of leaves it exactly as it was:
// its result does not depend on which rows share its CTA.
#pragma once
#include "attention_prefill_hopper_compute.cuh"
#include "attention_prefill_hopper_copy.cuh"
#include "barriers.cuh"

// Only compiled to something for sm_90a: other cards have no such instructions, and are never given these kernels.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

template <u32 REGISTERS>
__device__ __forceinline__ void fewer_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <u32 REGISTERS>
__device__ __forceinline__ void more_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

template <class S, class Addressing>
__device__ __forceinline__ void prefill(const Arguments& args, const Addressing& addressing) {
    extern __shared__ __align__(1024) u8 memory[];
    const u32 base = (shared_address(memory) + 1023) / 1024 * 1024;
    if (threadIdx.x == 0) {
        for (u32 i = 0; i < S::QUERIES; ++i) {
            barrier_init(base + S::QUERIES_FULL + i * 8, WARPGROUP);
            barrier_init(base + S::QUERIES_FREE + i * 8, CONSUMERS * WARPGROUP);
        }
        for (u32 i = 0; i < S::STAGES; ++i) {
            barrier_init(base + S::KEYS_FULL + i * 8, WARPGROUP);
            barrier_init(base + S::KEYS_FREE + i * 8, CONSUMER_WARPS);
            barrier_init(base + S::VALUES_FULL + i * 8, WARPGROUP);
            barrier_init(base + S::VALUES_FREE + i * 8, CONSUMER_WARPS);
        }
    }
    __syncthreads();
    const u32 warp = __shfl_sync(ALL_LANES, threadIdx.x / WARP, 0);
    if (warp < PRODUCER_WARPS) {
        fewer_registers<S::PRODUCER_REGISTERS>();
        produce<S>(args, addressing, base);
    } else {
        more_registers<S::CONSUMER_REGISTERS>();
        consume<S>(args, base, warp / 4 - 1, warp % 4);
    }
}

#define BODY(NUMBER, D, ADDRESSING)                                                                                \
    const Arguments args = {out,   qkv,      keys,   values,          starts, items,                               \
                            heads, kv_heads, window, scale * LOG2_E, pieces};                                      \
    prefill<Shape<NUMBER, D>>(args, ADDRESSING(tables, block_size));
#else
#define BODY(NUMBER, D, ADDRESSING)
#endif

// KV names what the cache holds in the kernels' names, NUMBER is its type.
#define PREFILL(KV, NUMBER, D, NAME, ADDRESSING)                                                                   \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) attention_prefill_hopper_##KV##_d##D##_##NAME(        \
        u16* out, const u16* qkv, const u8* keys, const u8* values, const u32* tables, const u32* starts,          \
        const Words4* items, u32 heads, u32 kv_heads, u32 block_size, u32 window, float scale, u32 pieces) {       \
        BODY(NUMBER, D, ADDRESSING)                                                                                \
    }

#define PREFILL_BOTH(KV, NUMBER, D)      \
    PREFILL(KV, NUMBER, D, paged, Paged) \
    PREFILL(KV, NUMBER, D, contiguous, Contiguous)

#define PREFILL_ALL(KV, NUMBER)   \
    PREFILL_BOTH(KV, NUMBER, 64)  \
    PREFILL_BOTH(KV, NUMBER, 80)  \
    PREFILL_BOTH(KV, NUMBER, 96)  \
    PREFILL_BOTH(KV, NUMBER, 128) \
    PREFILL_BOTH(KV, NUMBER, 256)
