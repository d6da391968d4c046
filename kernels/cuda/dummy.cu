// Random weights, bit for bit those that kernels/src/generated.rs makes on the CPU.
//
// Launch: fill_normal  grid any number up to rows, block 256, no dynamic shared memory.
#include "common.cuh"

// SplitMix64 (Steele, Lea & Flood 2014).
__device__ __forceinline__ u64 mix(u64 x) {
    x += 0x9E3779B97F4A7C15ull;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
    return x ^ (x >> 31);
}

// Fills a part of the tensor with key `key`: `rows` rows from first_row on, of `cols` columns from the first_four-th four of them
// on; `out` is where the first goes. Each 64 random bits give four elements, each a pick of the 65536 quantiles of the normal
// distribution.
extern "C" __global__ void __launch_bounds__(256)
    fill_normal(u16* __restrict__ out, u64 key, u32 rows, u32 cols, const float* __restrict__ quantiles,
                u32 first_row, u32 first_four) {
    constexpr float DEVIATION = 0.02f;
    const auto value = [&](u64 bits, u32 i) { return __fmul_rn(DEVIATION, quantiles[(bits >> (16 * i)) & 0xFFFF]); };
    for (u32 row = blockIdx.x; row < rows; row += gridDim.x) {
        const u64 row_key = mix(key + (u64(first_row) + row) * 0xD6E8FEB86659FD93ull);
        const auto bits_of = [&](u32 four) { return mix(row_key + (u64(first_four) + four) * 0x9E3779B97F4A7C15ull); };
        u16* to = out + u64(row) * cols;
        if (cols % 8 == 0) {
            for (u32 i = threadIdx.x; i < cols / 8; i += blockDim.x) {
                const u64 a = bits_of(2 * i), b = bits_of(2 * i + 1);
                reinterpret_cast<Words4*>(to)[i] = {
                    pack(value(a, 0), value(a, 1)), pack(value(a, 2), value(a, 3)),
                    pack(value(b, 0), value(b, 1)), pack(value(b, 2), value(b, 3))};
            }
        } else {
            for (u32 i = threadIdx.x; i < (cols + 3) / 4; i += blockDim.x) {
                const u64 bits = bits_of(i);
                for (u32 j = 0; j < 4 && 4 * i + j < cols; ++j) to[4 * i + j] = float_to_element(value(bits, j));
            }
        }
    }
}
