// The operations on rows of activations: embedding, normalization, rotation with the store of K and V, SwiGLU, copies.
//
// Activations are bfloat16 or halves (common.cuh), parameters float, arithmetic float. Base addresses are multiples of
// 16 bytes. A row's result depends on its own inputs and on the block's size, which follows from the widths alone. All
// may overlap with the kernel before them (take_turn in common.cuh).
//
// Launches; none takes dynamic shared memory. row_threads(cols) = clamp(round_up(ceil(cols / 8), 32), 32, 1024).
//
//   kernel            grid                                  block
//   embed             rows                                  row_threads(cols)
//   gather_rows       rows                                  row_threads(cols)
//   rms_norm          rows                                  row_threads(cols)
//   add_rms_norm      rows                                  row_threads(cols)
//   silu_mul          (ceil(n / 2048), rows <= 65535)       256
//   copy_slots        (pairs, arrays)                       128
//   zero_rows         any number, say min(rows, 128)        row_threads(cols)
//   rotate_and_store  (ceil(units * lanes / 128), rows)     128
//     units = heads + 2 kv_heads; lanes, the threads of a head: with half = head_dim / 2, the least power of two that
//     is at least half / 8 when 8 divides half, else 32. Rows <= 65535.
#include "common.cuh"

// Elements of a 16-byte access.
constexpr u32 VECTOR = 8;

// Blocks of 1024 threads on a multiprocessor that add_rms_norm's registers must leave room for: two make 32 registers a
// thread, which the compiler reaches without spilling for sm_90 but not for sm_80.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr u32 ADD_NORM_BLOCKS = 2;
#else
constexpr u32 ADD_NORM_BLOCKS = 1;
#endif

__device__ __forceinline__ Words4 load_vector(const u16* from, u32 vector) {
    return reinterpret_cast<const Words4*>(from)[vector];
}

__device__ __forceinline__ void store_vector(u16* to, u32 vector, const Words4& words) {
    reinterpret_cast<Words4*>(to)[vector] = words;
}

__device__ __forceinline__ void unpack_vector(const Words4& words, float (&x)[VECTOR]) {
    const u32 pairs[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (u32 i = 0; i < 4; ++i) {
        const float2 pair = unpack(pairs[i]);
        x[2 * i] = pair.x;
        x[2 * i + 1] = pair.y;
    }
}

__device__ __forceinline__ Words4 pack_vector(const float (&x)[VECTOR]) {
    return {pack(x[0], x[1]), pack(x[2], x[3]), pack(x[4], x[5]), pack(x[6], x[7])};
}

__device__ __forceinline__ void load_floats(const float* from, float (&x)[VECTOR]) {
#pragma unroll
    for (u32 i = 0; i < 2; ++i) {
        const float4 four = reinterpret_cast<const float4*>(from)[i];
        x[4 * i] = four.x;
        x[4 * i + 1] = four.y;
        x[4 * i + 2] = four.z;
        x[4 * i + 3] = four.w;
    }
}

__device__ __forceinline__ void copy_row(const u16* from, u16* to, u32 cols) {
    if (cols % VECTOR == 0) {
        for (u32 i = threadIdx.x; i < cols / VECTOR; i += blockDim.x) store_vector(to, i, load_vector(from, i));
    } else {
        for (u32 i = threadIdx.x; i < cols; i += blockDim.x) to[i] = from[i];
    }
}

// Ids from here on name rows of `sampled`, which the step before left: FED of kernels/src/backend.rs.
constexpr u32 FED = 1u << 31;

// out[row] = table[tokens[row]]
extern "C" __global__ void __launch_bounds__(1024)
    embed(const u32* tokens, const u32* sampled, const u16* __restrict__ table, u16* out, u32 cols) {
    take_turn();
    const u32 named = tokens[blockIdx.x];
    const u32 token = named < FED ? named : sampled[named - FED];
    copy_row(table + u64(token) * cols, out + u64(blockIdx.x) * cols, cols);
}

// out[row] = x[rows[row]]
extern "C" __global__ void __launch_bounds__(1024)
    gather_rows(const u16* x, const u32* rows, u16* out, u32 cols) {
    take_turn();
    copy_row(x + u64(rows[blockIdx.x]) * cols, out + u64(blockIdx.x) * cols, cols);
}

// Copies K and V of slots between a cache and `there`: host memory, which the device addresses over the bus, or the cache
// itself. Of each of the arrays (gridDim.y: K and V of every layer) the rows of `vectors` 16-byte words that the pairs name,
// the first in the cache; arrays are `cache_array` and `there_array` words apart.
extern "C" __global__ void __launch_bounds__(128)
    copy_slots(Words4* cache, Words4* there, const uint2* pairs, u64 cache_array, u64 there_array, u32 vectors, u32 out) {
    take_turn();
    const uint2 pair = pairs[blockIdx.x];
    Words4* here = cache + blockIdx.y * cache_array + u64(pair.x) * vectors;
    Words4* other = there + blockIdx.y * there_array + u64(pair.y) * vectors;
    const Words4* from = out ? here : other;
    Words4* to = out ? other : here;
    for (u32 i = threadIdx.x; i < vectors; i += blockDim.x) to[i] = from[i];
}

// Zeroes the rows from *first_row on, of `rows`. The first row is read on the device, so that a captured graph can
// serve batches of several sizes.
extern "C" __global__ void __launch_bounds__(1024) zero_rows(u16* out, const u32* first_row, u32 rows, u32 cols) {
    take_turn();
    for (u64 row = u64(*first_row) + blockIdx.x; row < rows; row += gridDim.x) {
        u16* to = out + row * cols;
        if (cols % VECTOR == 0) {
            for (u32 i = threadIdx.x; i < cols / VECTOR; i += blockDim.x) store_vector(to, i, Words4{0, 0, 0, 0});
        } else {
            for (u32 i = threadIdx.x; i < cols; i += blockDim.x) to[i] = 0;
        }
    }
}

// A vector of the row to be normalized; with ADD, the vector of the residual after `delta` is added and stored.
template <bool ADD>
__device__ __forceinline__ Words4 norm_input(u16* x, const u16* delta, u32 vector) {
    Words4 words = load_vector(x, vector);
    if (ADD) {
        float a[VECTOR], b[VECTOR];
        unpack_vector(words, a);
        unpack_vector(load_vector(delta, vector), b);
#pragma unroll
        for (u32 i = 0; i < VECTOR; ++i) a[i] += b[i];
        words = pack_vector(a);
        store_vector(x, vector, words);
    }
    return words;
}

__device__ __forceinline__ float squares_of(const Words4& words) {
    float x[VECTOR], sum = 0.0f;
    unpack_vector(words, x);
#pragma unroll
    for (u32 i = 0; i < VECTOR; ++i) sum = fmaf(x[i], x[i], sum);
    return sum;
}

__device__ __forceinline__ Words4 normalized(const Words4& words, const float (&weight)[VECTOR], float scale) {
    float x[VECTOR];
    unpack_vector(words, x);
#pragma unroll
    for (u32 i = 0; i < VECTOR; ++i) x[i] = x[i] * scale * weight[i];
    return pack_vector(x);
}

// out = x / rms(x) * weight, after x += delta with ADD. A thread's first vector stays in registers, which is all of the
// row up to 8192 columns; its weights are fetched before the reduction, whose latency then hides theirs. What does not
// fit is read again by the thread that wrote it.
template <bool ADD>
__device__ __forceinline__ void norm_row(u16* x, const u16* delta, const float* __restrict__ weight,
                                         float eps, u16* out, u32 cols) {
    const u32 first = threadIdx.x;
    if (cols % VECTOR == 0) {
        const u32 vectors = cols / VECTOR;
        Words4 kept = {0, 0, 0, 0};
        float weights[VECTOR] = {};
        if (first < vectors) {
            load_floats(weight + first * VECTOR, weights);
            kept = norm_input<ADD>(x, delta, first);
        }
        float squares = squares_of(kept);
        for (u32 i = first + blockDim.x; i < vectors; i += blockDim.x) {
            squares += squares_of(norm_input<ADD>(x, delta, i));
        }
        // Keeps the compiler from carrying 8 floats over the reduction in place of these 4 words.
        asm("" : "+r"(kept.x), "+r"(kept.y), "+r"(kept.z), "+r"(kept.w));
        const float scale = 1.0f / sqrtf(block_sum(squares) / float(cols) + eps);
        if (first < vectors) store_vector(out, first, normalized(kept, weights, scale));
        for (u32 i = first + blockDim.x; i < vectors; i += blockDim.x) {
            load_floats(weight + i * VECTOR, weights);
            store_vector(out, i, normalized(load_vector(x, i), weights, scale));
        }
    } else {
        float squares = 0.0f;
        for (u32 i = first; i < cols; i += blockDim.x) {
            if (ADD) x[i] = float_to_element(element_to_float(x[i]) + element_to_float(delta[i]));
            const float value = element_to_float(x[i]);
            squares = fmaf(value, value, squares);
        }
        const float scale = 1.0f / sqrtf(block_sum(squares) / float(cols) + eps);
        for (u32 i = first; i < cols; i += blockDim.x) {
            out[i] = float_to_element(element_to_float(x[i]) * scale * weight[i]);
        }
    }
}

// out = x / sqrt(mean(x^2) + eps) * weight
extern "C" __global__ void __launch_bounds__(1024, 2)
    rms_norm(const u16* x, const float* __restrict__ weight, float eps, u16* out, u32 cols) {
    take_turn();
    const u64 at = u64(blockIdx.x) * cols;
    norm_row<false>(const_cast<u16*>(x) + at, nullptr, weight, eps, out + at, cols);
}

// residual += delta, rounded; out = rms_norm(residual)
extern "C" __global__ void __launch_bounds__(1024, ADD_NORM_BLOCKS)
    add_rms_norm(u16* residual, const u16* delta, const float* __restrict__ weight, float eps, u16* out, u32 cols) {
    take_turn();
    const u64 at = u64(blockIdx.x) * cols;
    norm_row<true>(residual + at, delta + at, weight, eps, out + at, cols);
}

// out = silu(gate) * up, for rows of n gates, then n ups.
extern "C" __global__ void __launch_bounds__(256)
    silu_mul(const u16* gate_up, u16* out, u32 n) {
    take_turn();
    const u16* gate = gate_up + u64(blockIdx.y) * 2 * n;
    const u16* up = gate + n;
    out += u64(blockIdx.y) * n;
    if (n % VECTOR == 0) {
        const u32 vector = blockIdx.x * blockDim.x + threadIdx.x;
        if (vector >= n / VECTOR) return;
        float g[VECTOR], u[VECTOR];
        unpack_vector(load_vector(gate, vector), g);
        unpack_vector(load_vector(up, vector), u);
#pragma unroll
        for (u32 i = 0; i < VECTOR; ++i) g[i] = silu(g[i]) * u[i];
        store_vector(out, vector, pack_vector(g));
    } else {
        const u32 begin = blockIdx.x * blockDim.x * VECTOR;
        const u32 end = min(n, begin + blockDim.x * VECTOR);
        for (u32 i = begin + threadIdx.x; i < end; i += blockDim.x) {
            out[i] = float_to_element(silu(element_to_float(gate[i])) * element_to_float(up[i]));
        }
    }
}

// How the cache holds its numbers: eight of them stored at a multiple of eight elements, or one.
struct StoreBf16 {
    static constexpr u32 BYTES = 2;
    static __device__ __forceinline__ void eight(u8* to, const float (&x)[VECTOR]) {
        *reinterpret_cast<Words4*>(to) = {pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]), pack_bf16(x[4], x[5]),
                                          pack_bf16(x[6], x[7])};
    }
    static __device__ __forceinline__ void one(u8* to, float x) {
        *reinterpret_cast<u16*>(to) = u16(pack_bf16(x, 0.0f) & 0xFFFFu);
    }
};
struct StoreF16 {
    static constexpr u32 BYTES = 2;
    static __device__ __forceinline__ u32 pair(float low, float high) {
        return pack_f16(saturate_f16(low), saturate_f16(high));
    }
    static __device__ __forceinline__ void eight(u8* to, const float (&x)[VECTOR]) {
        *reinterpret_cast<Words4*>(to) = {pair(x[0], x[1]), pair(x[2], x[3]), pair(x[4], x[5]), pair(x[6], x[7])};
    }
    static __device__ __forceinline__ void one(u8* to, float x) {
        *reinterpret_cast<u16*>(to) = u16(pair(x, 0.0f) & 0xFFFFu);
    }
};
struct StoreFp8 {
    static constexpr u32 BYTES = 1;
    static __device__ __forceinline__ void eight(u8* to, const float (&x)[VECTOR]) {
        const float low[4] = {x[0], x[1], x[2], x[3]}, high[4] = {x[4], x[5], x[6], x[7]};
        *reinterpret_cast<uint2*>(to) = make_uint2(pack_e4m3(low), pack_e4m3(high));
    }
    static __device__ __forceinline__ void one(u8* to, float x) {
        const float alone[4] = {x, 0.0f, 0.0f, 0.0f};
        *to = u8(pack_e4m3(alone) & 0xFFu);
    }
};

#if defined(ACTIVATIONS_F16)
using StoreActivation = StoreF16;
#else
using StoreActivation = StoreBf16;
#endif

// One head of a row as its threads see it. `lane` counts those threads; `to` is where the head goes: back for Q, to
// the cache for K and V. V is neither normalized nor rotated.
struct Head {
    const u16* from;
    u8* to;
    bool cached;
    const float* weight;
    bool rotates;
    bool present;
    u32 lane;
    u32 lanes;
    u32 half;
};

// 1 / rms of a head, from its threads' sums of squares. The whole warp must call it.
__device__ __forceinline__ float head_scale(float squares, const Head& head, float eps) {
    for (u32 lane = head.lanes / 2; lane > 0; lane /= 2) squares += __shfl_xor_sync(0xFFFFFFFFu, squares, lane);
    return 1.0f / sqrtf(squares / float(2 * head.half) + eps);
}

// Eight elements, or one, from `element` on.
template <class Cache>
__device__ __forceinline__ void store_eight(const Head& head, u32 element, const float (&x)[VECTOR]) {
    if (head.cached) Cache::eight(head.to + element * Cache::BYTES, x);
    else StoreActivation::eight(head.to + element * StoreActivation::BYTES, x);
}
template <class Cache>
__device__ __forceinline__ void store_one(const Head& head, u32 element, float x) {
    if (head.cached) Cache::one(head.to + element * Cache::BYTES, x);
    else StoreActivation::one(head.to + element * StoreActivation::BYTES, x);
}

// A thread holds 8 elements of the lower half and the 8 that they rotate with.
template <class Cache>
__device__ __forceinline__ void move_head_vectors(const Head& head, const float2* __restrict__ angles, bool norm,
                                                  float eps) {
    const bool active = head.present && head.lane < head.half / VECTOR;
    Words4 low = {0, 0, 0, 0}, high = {0, 0, 0, 0};
    if (active) {
        low = load_vector(head.from, head.lane);
        high = load_vector(head.from + head.half, head.lane);
    }
    const float scale = norm ? head_scale(squares_of(low) + squares_of(high), head, eps) : 1.0f;
    if (!active) return;
    float a[VECTOR], b[VECTOR];
    unpack_vector(low, a);
    unpack_vector(high, b);
    if (head.rotates) {
        float weight[VECTOR];
        if (norm) {
            load_floats(head.weight + head.lane * VECTOR, weight);
#pragma unroll
            for (u32 i = 0; i < VECTOR; ++i) a[i] = a[i] * scale * weight[i];
            load_floats(head.weight + head.half + head.lane * VECTOR, weight);
#pragma unroll
            for (u32 i = 0; i < VECTOR; ++i) b[i] = b[i] * scale * weight[i];
        }
        const float4* pairs = reinterpret_cast<const float4*>(angles + head.lane * VECTOR);
#pragma unroll
        for (u32 i = 0; i < VECTOR; i += 2) {
            const float4 two = pairs[i / 2];
            const float cos[2] = {two.x, two.z}, sin[2] = {two.y, two.w};
#pragma unroll
            for (u32 j = 0; j < 2; ++j) {
                const float x = a[i + j], y = b[i + j];
                a[i + j] = x * cos[j] - y * sin[j];
                b[i + j] = y * cos[j] + x * sin[j];
            }
        }
    }
    store_eight<Cache>(head, head.lane * VECTOR, a);
    store_eight<Cache>(head, head.half + head.lane * VECTOR, b);
}

// The same for any even width up to 256: a warp a head, an element and its partner at a time.
template <class Cache>
__device__ __forceinline__ void move_head_elements(const Head& head, const float2* __restrict__ angles, bool norm,
                                                   float eps) {
    constexpr u32 MOST = 4;
    float a[MOST] = {}, b[MOST] = {}, squares = 0.0f;
#pragma unroll
    for (u32 j = 0; j < MOST; ++j) {
        const u32 i = head.lane + j * WARP;
        if (head.present && i < head.half) {
            a[j] = element_to_float(head.from[i]);
            b[j] = element_to_float(head.from[i + head.half]);
            squares += a[j] * a[j] + b[j] * b[j];
        }
    }
    const float scale = norm ? head_scale(squares, head, eps) : 1.0f;
#pragma unroll
    for (u32 j = 0; j < MOST; ++j) {
        const u32 i = head.lane + j * WARP;
        if (!head.present || i >= head.half) continue;
        float x = a[j], y = b[j];
        if (head.rotates) {
            if (norm) {
                x = x * scale * head.weight[i];
                y = y * scale * head.weight[i + head.half];
            }
            const float2 angle = angles[i];
            const float low = x * angle.x - y * angle.y;
            y = y * angle.x + x * angle.y;
            x = low;
        }
        store_one<Cache>(head, i, x);
        store_one<Cache>(head, i + head.half, y);
    }
}

// Normalizes (when q_norm and k_norm are given) and rotates Q in place; stores K, treated likewise, and V at the row's
// slot of one layer's caches, [slots][kv_heads][head_dim]. A row of qkv is Q, K, V; `table` holds cosine and sine,
// [positions][head_dim / 2]. Rows without a slot are left alone.
template <class Cache>
__device__ __forceinline__ void rotate_row(u16* qkv, const float2* __restrict__ table, const u32* positions,
                                           const u32* slots, const float* __restrict__ q_norm,
                                           const float* __restrict__ k_norm, float eps, u8* k_cache, u8* v_cache,
                                           u32 heads, u32 kv_heads, u32 head_dim) {
    take_turn();
    const u32 row = blockIdx.y;
    const u32 slot = slots[row];
    const u32 position = positions[row];
    if (slot == NO_SLOT) return;
    const u32 half = head_dim / 2, units = heads + 2 * kv_heads;
    const bool vectors = half % VECTOR == 0;
    const u32 lanes = vectors ? 1u << (WARP - __clz(int(half / VECTOR) - 1)) : WARP;
    const u32 thread = blockIdx.x * blockDim.x + threadIdx.x;
    const u32 unit = thread / lanes;
    u16* from = qkv + (u64(row) * units + unit) * head_dim;
    u8* to = reinterpret_cast<u8*>(from);
    if (unit >= heads) {
        const bool k = unit < heads + kv_heads;
        const u32 kv_head = unit - heads - (k ? 0 : kv_heads);
        to = (k ? k_cache : v_cache) + (u64(slot) * kv_heads + kv_head) * head_dim * Cache::BYTES;
    }
    const Head head = {from, to, unit >= heads, unit < heads ? q_norm : k_norm, unit < heads + kv_heads,
                       unit < units, thread % lanes, lanes, half};
    const float2* angles = table + u64(position) * half;
    if (vectors) {
        move_head_vectors<Cache>(head, angles, q_norm != nullptr, eps);
    } else {
        move_head_elements<Cache>(head, angles, q_norm != nullptr, eps);
    }
}

#define ROTATE_AND_STORE(KV, CACHE)                                                                                    \
    extern "C" __global__ void __launch_bounds__(128) rotate_and_store_##KV(                                           \
        u16* qkv, const float2* __restrict__ table, const u32* positions, const u32* slots,                            \
        const float* __restrict__ q_norm, const float* __restrict__ k_norm, float eps, u8* k_cache, u8* v_cache,       \
        u32 heads, u32 kv_heads, u32 head_dim) {                                                                       \
        rotate_row<CACHE>(qkv, table, positions, slots, q_norm, k_norm, eps, k_cache, v_cache, heads, kv_heads,        \
                          head_dim);                                                                                   \
    }

ROTATE_AND_STORE(bf16, StoreBf16)
ROTATE_AND_STORE(f16, StoreF16)
ROTATE_AND_STORE(fp8, StoreFp8)
