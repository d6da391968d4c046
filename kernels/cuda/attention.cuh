// What the attention kernels share: where a position's keys and values lie, tiles of them in shared memory, the
// matrix instructions and the online softmax.
//
// Fragments, with g = lane / 4 and t = lane % 4, as mma.m16n8k16 has them:
//   A (16 x 16): a0 = (row g, columns 2t, 2t+1), a1 = (row g+8, same), a2 = (row g, columns 2t+8, 2t+9), a3 = (g+8, ..)
//   B (16 x 8):  b0 = (rows 2t, 2t+1, column g), b1 = (rows 2t+8, 2t+9, column g)
//   C (16 x 8):  c0, c1 = (row g, columns 2t, 2t+1), c2, c3 = (row g+8, same)
// Two C tiles of scores side by side, rounded and packed, are thus one A tile of weights, in the same registers.
#pragma once
#include "common.cuh"

constexpr u32 ALL_LANES = 0xFFFFFFFFu;
constexpr float LOG2_E = 1.4426950408889634f;

// What the matrix instructions multiply; weights are rounded to it. Q comes as activations are, and is rounded to it
// where that is something else: of halves, a cache of bfloat16 leaves 8 bits, as many as its keys have.
struct Bf16 {
    static constexpr bool QUERIES_AS_THEY_ARE = !ACTIVATIONS_ARE_F16;
    static __device__ __forceinline__ u32 pack(float low, float high) { return pack_bf16(low, high); }
    static __device__ __forceinline__ u32 query(u32 pair) {
        if constexpr (QUERIES_AS_THEY_ARE) return pair;
        const float2 x = unpack_f16(pair);
        return pack_bf16(x.x, x.y);
    }

    // c += a * b, in single precision.
    static __device__ __forceinline__ void multiply(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
};

struct F16 {
    static constexpr bool QUERIES_AS_THEY_ARE = ACTIVATIONS_ARE_F16;
    static __device__ __forceinline__ u32 pack(float low, float high) { return pack_f16(low, high); }
    // Exact, but for what is smaller than a half resolves or greater than it holds. Halves are finite already: done to
    // them again, it keeps ptxas from spilling registers where heads are of 256 elements.
    static __device__ __forceinline__ u32 query(u32 pair) {
        if constexpr (QUERIES_AS_THEY_ARE) return finite_f16(pair);
        const float2 x = unpack_bf16(pair);
        return pack_f16(saturate_f16(x.x), saturate_f16(x.y));
    }
    static __device__ __forceinline__ void multiply(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
};

// What the KV cache holds, by its bytes, and what it is multiplied as: every e4m3 number is a half.
struct KvBf16 : Bf16 {
    static constexpr u32 BYTES = 2;
};
struct KvF16 : F16 {
    static constexpr u32 BYTES = 2;
};
struct KvFp8 : F16 {
    static constexpr u32 BYTES = 1;
};

// How a row of one head lies in shared memory. Where its 16-byte pieces are even in number it is one piece longer than
// it is, if it is PADDED, so that eight rows' pieces, which one matrix load reads at once, are in different banks (the
// stride is an odd number of pieces).
template <u32 ELEMENT_BYTES, u32 D, bool PADDED = true>
struct HeadRow {
    static constexpr u32 PIECES = D * ELEMENT_BYTES / 16;
    static constexpr u32 STRIDE = (PIECES + (PADDED && PIECES % 2 == 0 ? 1 : 0)) * 16;
};

// A table entry on its way, and what is still to be added to it. Kept apart so that asking for an entry does not wait
// for it: the sum is made when the slot is used, a tile later.
struct Lookup {
    u32 entry;
    u32 within;  // NO_SLOT: there is no such position
};

// Position p of sequence s at slot tables[starts[s] + p / block_size] * block_size + p % block_size.
struct Paged {
    const u32* tables;
    u32 block_size;
    u32 shift;  // of a block size that is a power of two, else 32

    __device__ __forceinline__ Paged(const u32* tables, u32 block_size)
        : tables(tables),
          block_size(block_size),
          shift((block_size & (block_size - 1)) == 0 ? 31 - __clz(int(block_size)) : 32) {}

    __device__ __forceinline__ Lookup lookup(u32 start, u32 position) const {
        const u32 block = shift < 32 ? position >> shift : position / block_size;
        return {__ldg(tables + start + block), position - block * block_size};
    }
    __device__ __forceinline__ u32 slot(const Lookup& found) const {
        return found.within == NO_SLOT ? NO_SLOT : found.entry * block_size + found.within;
    }
};

// Position p of sequence s at slot starts[s] + p.
struct Contiguous {
    __device__ __forceinline__ Contiguous(const u32*, u32) {}

    __device__ __forceinline__ Lookup lookup(u32 start, u32 position) const { return {0, start + position}; }
    __device__ __forceinline__ u32 slot(const Lookup& found) const { return found.within; }
};

// Asks for the slots of ROWS positions from `position` on, one a lane; those outside [first, end) have none.
template <u32 ROWS, class Addressing>
__device__ __forceinline__ Lookup look_up(const Addressing& addressing, u32 start, u32 position, u32 first, u32 end) {
    const u32 mine = position + threadIdx.x % ROWS;
    if (mine < first || mine >= end) return {0, NO_SLOT};
    return addressing.lookup(start, mine);
}

// One head's keys and values in one layer.
struct HeadCache {
    const u8* keys;  // of slot 0's first head, as are the values: addresses that stay constant take no registers
    const u8* values;
    u32 slot_bytes;
    u32 head_byte;

    template <class Kv, u32 D>
    static __device__ __forceinline__ HeadCache of(const u8* keys, const u8* values, u32 kv_heads, u32 kv_head) {
        return {keys, values, kv_heads * D * Kv::BYTES, kv_head * D * Kv::BYTES};
    }
};

// A warp starts copying the keys and values of ROWS slots, lane i holding the slot of row i; as many rows at once as
// have lanes for all their pieces. Rows without a slot become zero: a weight of zero times what an unused slot may hold
// would not be zero if that is no number.
template <class Row, u32 ROWS>
__device__ __forceinline__ void copy_rows(u32 keys, u32 values, const HeadCache& from, u32 slot) {
    constexpr u32 AT_ONCE = WARP / Row::PIECES;
    constexpr bool EVEN = AT_ONCE * Row::PIECES == WARP && ROWS % AT_ONCE == 0;
    const u32 lane = threadIdx.x % WARP;
    const u32 lane_row = lane / Row::PIECES, lane_byte = lane % Row::PIECES * 16;
#pragma unroll 8  // more would need too many registers where rows are long
    for (u32 first = 0; first < ROWS; first += AT_ONCE) {
        const u32 row = first + lane_row;
        const u32 row_slot = __shfl_sync(ALL_LANES, slot, int(row));
        if (!EVEN && (lane_row >= AT_ONCE || row >= ROWS)) continue;
        const bool valid = row_slot != NO_SLOT;
        const u64 source = u64(valid ? row_slot : 0) * from.slot_bytes + (from.head_byte + lane_byte);
        const u32 target = row * Row::STRIDE + lane_byte;
        copy_async_16(keys + target, from.keys + source, valid);
        copy_async_16(values + target, from.values + source, valid);
    }
}

// Four 8 x 8 tiles of 16-bit elements; lane i gives the address of row i % 8 of tile i / 8.
__device__ __forceinline__ void load_tiles(u32 (&to)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
}
__device__ __forceinline__ void load_tiles_transposed(u32 (&to)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
}

// Where this lane reads, relative to the first row, when a warp loads 16 x 16 elements:
// of queries (A) and of values (B, transposed): tiles in the order (rows 0-7, left), (rows 8-15, left), (0-7, right),
// (8-15, right);
template <u32 STRIDE, u32 RIGHT = 16>
__device__ __forceinline__ u32 lane_offset_by_column() {
    const u32 lane = threadIdx.x % WARP;
    return lane % 16 * STRIDE + lane / 16 * RIGHT;
}
// of keys (B): (rows 0-7, left), (0-7, right), (8-15, left), (8-15, right), which is b0, b1 of the first eight keys,
// then b0, b1 of the others. RIGHT is how many bytes the right tiles are from the left ones.
template <u32 STRIDE, u32 RIGHT = 16>
__device__ __forceinline__ u32 lane_offset_by_row() {
    const u32 lane = threadIdx.x % WARP;
    return (lane % 8 + lane / 16 * 8) * STRIDE + lane / 8 % 2 * RIGHT;
}

__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Over the four lanes that hold one row.
__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 1));
    return fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(ALL_LANES, x, 1);
    return x + __shfl_xor_sync(ALL_LANES, x, 2);
}

// What one may subtract from scores whose greatest is `max`: where a row has seen nothing yet, the greatest is minus
// infinity, and minus infinity less itself would be no number.
__device__ __forceinline__ float finite_max(float max) { return max == NEG_INFINITY ? 0.0f : max; }

// Two rows (g and g + 8) of a softmax that is not complete: the sum of weights is this lane's share of it.
struct Softmax {
    float max[2] = {NEG_INFINITY, NEG_INFINITY};  // times scale * log2(e)
    float sum[2] = {0.0f, 0.0f};
};

// Scores become weights relative to the rows' greatest so far, by which the sums and `acc` are rescaled.
template <u32 SCORE_TILES, u32 OUT_TILES>
__device__ __forceinline__ void weigh(float (&scores)[SCORE_TILES][4], float (&acc)[OUT_TILES][4], Softmax& softmax,
                                      float scale_log2) {
#pragma unroll
    for (u32 half = 0; half < 2; ++half) {
        float greatest = NEG_INFINITY;
#pragma unroll
        for (u32 j = 0; j < SCORE_TILES; ++j)
            greatest = fmaxf(greatest, fmaxf(scores[j][2 * half], scores[j][2 * half + 1]));
        const float max = fmaxf(softmax.max[half], quad_max(greatest) * scale_log2);
        const float base = finite_max(max);
        const float rescale = exp2_approx(softmax.max[half] - base);
        softmax.max[half] = max;
        softmax.sum[half] *= rescale;
#pragma unroll
        for (u32 j = 0; j < OUT_TILES; ++j) {
            acc[j][2 * half] *= rescale;
            acc[j][2 * half + 1] *= rescale;
        }
#pragma unroll
        for (u32 j = 0; j < SCORE_TILES; ++j) {
#pragma unroll
            for (u32 i = 2 * half; i < 2 * half + 2; ++i) {
                scores[j][i] = exp2_approx(fmaf(scores[j][i], scale_log2, -base));
                softmax.sum[half] += scores[j][i];
            }
        }
    }
}

// The positions that rows g and g + 8 see: from `low` up to but not including `high`.
struct Visible {
    u32 low[2];
    u32 high[2];
};

// Scores of positions that a row does not see become minus infinity; `position` is the first of the tile.
template <u32 SCORE_TILES>
__device__ __forceinline__ void hide(float (&scores)[SCORE_TILES][4], const Visible& visible, u32 position) {
    const u32 mine = position + threadIdx.x % 4 * 2;
#pragma unroll
    for (u32 j = 0; j < SCORE_TILES; ++j) {
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
            const u32 at = mine + 8 * j + i % 2;
            if (at < visible.low[i / 2] || at >= visible.high[i / 2]) scores[j][i] = NEG_INFINITY;
        }
    }
}

// First position that the row at `position` sees under a sliding window of `window` tokens, 0 for none.
__device__ __forceinline__ u32 window_start(u32 position, u32 window) {
    return window != 0 && position + 1 > window ? position + 1 - window : 0;
}

// acc += weights * values, for 16 rows of weights a block of `weights`; `values` is this lane's address of the first.
template <class Number, u32 STRIDE, u32 BLOCKS, u32 SCORE_TILES, u32 OUT_TILES>
__device__ __forceinline__ void add_values(float (&acc)[BLOCKS][OUT_TILES][4],
                                           const float (&weights)[BLOCKS][SCORE_TILES][4], u32 values) {
#pragma unroll
    for (u32 k = 0; k < SCORE_TILES / 2; ++k) {
        u32 a[BLOCKS][4];
#pragma unroll
        for (u32 b = 0; b < BLOCKS; ++b) {
            const float(&left)[4] = weights[b][2 * k];
            const float(&right)[4] = weights[b][2 * k + 1];
            a[b][0] = Number::pack(left[0], left[1]);
            a[b][1] = Number::pack(left[2], left[3]);
            a[b][2] = Number::pack(right[0], right[1]);
            a[b][3] = Number::pack(right[2], right[3]);
        }
#pragma unroll
        for (u32 j = 0; j < OUT_TILES / 2; ++j) {
            u32 v[4];
            load_tiles_transposed(v, values + k * 16 * STRIDE + j * 32);
#pragma unroll
            for (u32 b = 0; b < BLOCKS; ++b) {
                Number::multiply(acc[b][2 * j], a[b], v[0], v[1]);
                Number::multiply(acc[b][2 * j + 1], a[b], v[2], v[3]);
            }
        }
    }
}
