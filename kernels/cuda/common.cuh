// What every kernel file starts from: types, numbers of 16 and 8 bits, warp and block reductions, asynchronous copies.
//
// Nothing is included from outside this folder, so that NVRTC compiles these files on a machine that has no CUDA
// toolkit. Addresses of device memory come as plain pointers; a bfloat16 or a half in memory is its 16 bits.
//
// Activations and weights are bfloat16 or, where ACTIVATIONS_F16 is defined, halves: a file is compiled once for each.
#pragma once

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

// Slot that stores nothing: the padding rows of a batch carry it.
constexpr u32 NO_SLOT = 0xFFFFFFFFu;
constexpr u32 WARP = 32;
// A macro, since NVRTC has no constant expression for it.
#define NEG_INFINITY (-__int_as_float(0x7F800000))

struct alignas(16) Words4 {
    u32 x, y, z, w;
};

// The two bfloat16 numbers of a word, low first.
__device__ __forceinline__ float2 unpack_bf16(u32 pair) {
    return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xFFFF0000u));
}

// Round to nearest even; `low` comes first in memory.
__device__ __forceinline__ u32 pack_bf16(float low, float high) {
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

// The same as halves. What is too large becomes infinite: saturate_f16 keeps it finite.
__device__ __forceinline__ u32 pack_f16(float low, float high) {
    u32 pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}
__device__ __forceinline__ float saturate_f16(float x) { return x == x ? fminf(fmaxf(x, -65504.0f), 65504.0f) : x; }

// The two halves of a word as floats, low first.
__device__ __forceinline__ float2 unpack_f16(u32 pair) {
    float2 x;
    asm("{\n.reg .f16 low, high;\nmov.b32 {low, high}, %2;\ncvt.f32.f16 %0, low;\ncvt.f32.f16 %1, high;\n}"
        : "=f"(x.x), "=f"(x.y)
        : "r"(pair));
    return x;
}
// The same pair of halves with the greatest finite ones in place of infinities; what is no number stays so.
__device__ __forceinline__ u32 finite_f16(u32 pair) {
    u32 finite;
    asm("{\n.reg .b32 below;\nmin.NaN.f16x2 below, %1, %2;\nmax.NaN.f16x2 %0, below, %3;\n}"
        : "=r"(finite)
        : "r"(pair), "r"(0x7BFF7BFFu), "r"(0xFBFFFBFFu));
    return finite;
}

// A pair of activations: to floats and, rounded to nearest even, back; low comes first in memory.
//
// Halves end at 65,504, which sums of some models exceed. What is too large is held as that: an infinity would become
// no number in the next norm, and take the rest of its row with it. cuBLASLt rounds to infinity, so reading makes the
// same of it.
#if defined(ACTIVATIONS_F16)
constexpr bool ACTIVATIONS_ARE_F16 = true;
#define ACTIVATION "f16"  // in the names of matrix instructions
__device__ __forceinline__ float2 unpack(u32 pair) { return unpack_f16(finite_f16(pair)); }
__device__ __forceinline__ u32 pack(float low, float high) { return finite_f16(pack_f16(low, high)); }
#else
constexpr bool ACTIVATIONS_ARE_F16 = false;
#define ACTIVATION "bf16"
__device__ __forceinline__ float2 unpack(u32 pair) { return unpack_bf16(pair); }
__device__ __forceinline__ u32 pack(float low, float high) { return pack_bf16(low, high); }
#endif
__device__ __forceinline__ float element_to_float(u16 bits) { return unpack(bits).x; }
__device__ __forceinline__ u16 float_to_element(float x) { return u16(pack(x, 0.0f) & 0xFFFFu); }

// Four e4m3 numbers (OCP 8-bit floating point: 4 bits of exponent, 3 of mantissa, no infinity), the first in the low
// byte: round to nearest even, the greatest in place of what is too large.
__device__ __forceinline__ u32 pack_e4m3(const float (&x)[4]);
// Two e4m3 numbers, those of the low 16 bits, as halves: exact.
__device__ __forceinline__ u32 widen_e4m3(u32 pair);

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
__device__ __forceinline__ u32 pack_e4m3(const float (&x)[4]) {
    u16 low, high;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(low) : "f"(x[1]), "f"(x[0]));
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(high) : "f"(x[3]), "f"(x[2]));
    return low | u32(high) << 16;
}
__device__ __forceinline__ u32 widen_e4m3(u32 pair) {
    u32 wide;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(wide) : "h"(u16(pair)));
    return wide;
}
#else
__device__ __forceinline__ u32 to_e4m3(float x) {
    const u32 bits = __float_as_uint(x), sign = bits >> 24 & 0x80u, size = bits & 0x7FFFFFFFu;
    if (size > 0x7F800000u) return sign | 0x7Fu;
    if (size >= __float_as_uint(448.0f)) return sign | 0x7Eu;
    // Below 2^-6 the steps are of 2^-9.
    if (size < __float_as_uint(0.015625f)) return sign | u32(__float2int_rn(__uint_as_float(size) * 512.0f));
    return sign | min(((size + 0x7FFFFu + (size >> 20 & 1u)) >> 20) - (120u << 3), 0x7Eu);
}
__device__ __forceinline__ u32 pack_e4m3(const float (&x)[4]) {
    return to_e4m3(x[0]) | to_e4m3(x[1]) << 8 | to_e4m3(x[2]) << 16 | to_e4m3(x[3]) << 24;
}
__device__ __forceinline__ u32 widen_e4m3(u32 pair) {
    // Exponent and mantissa go where a half has them, which gives 2^-8 of the value (the biases are 7 and 15) and 480
    // for what is no number.
    const u32 high = __byte_perm(pair, 0, 0x1404);
    const u32 scaled = (high & 0x80008000u) | (high & 0x7F007F00u) >> 1;
    u32 wide;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(wide) : "r"(scaled), "r"(0x5C005C00u));
    return wide;
}
#endif

__device__ __forceinline__ float warp_sum(float x) {
    for (u32 lane = WARP / 2; lane > 0; lane /= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, lane);
    return x;
}

__device__ __forceinline__ float warp_max(float x) {
    for (u32 lane = WARP / 2; lane > 0; lane /= 2) x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, lane));
    return x;
}

// Sum over a block of whole warps, given to every thread, in an order that only the block's size fixes. May be called
// again at once.
__device__ __forceinline__ float block_sum(float x) {
    __shared__ float warps[WARP];
    x = warp_sum(x);
    __syncthreads();
    if (threadIdx.x % WARP == 0) warps[threadIdx.x / WARP] = x;
    __syncthreads();
    float sum = 0.0f;
    for (u32 warp = 0; warp < blockDim.x / WARP; ++warp) sum += warps[warp];
    return sum;
}

// Address in shared memory as PTX wants it.
__device__ __forceinline__ u32 shared_address(const void* pointer) { return u32(__cvta_generic_to_shared(pointer)); }

__device__ __forceinline__ void store_shared(u32 address, const Words4& words) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(words.x), "r"(words.y), "r"(words.z),
                 "r"(words.w)
                 : "memory");
}
__device__ __forceinline__ Words4 load_shared(u32 address) {
    Words4 words;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
                 : "r"(address)
                 : "memory");
    return words;
}

// 16 bytes from global to shared memory, past the first-level cache. With `valid` false, zeros.
__device__ __forceinline__ void copy_async_16(u32 shared, const void* global, bool valid = true) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(valid ? 16 : 0)
                 : "memory");
}
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
__device__ __forceinline__ void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Programmatic dependent launch. A kernel that may overlap (Device::overlapping_kernel) starts as soon as every block
// of the kernel before it in the stream has started and said let_next_start. So it must wait_for_earlier before it
// reads what any earlier kernel writes, and before it writes what any earlier kernel reads or writes; before that it
// may only touch its own shared memory and read what no kernel of a step writes: weights and tables. Why one wait is
// enough, however early the next kernel is let start: some thread of every such kernel waits, in every launch, and a
// kernel has not ended before its threads have. So when the wait of kernel N returns, N - 1 has ended, and before that
// the wait of N - 1 had returned, so that N - 2 had ended, and so on down to a kernel launched without overlap or a
// copy, which starts when all before it have ended and lets nothing start before it ends. It is also why no block can
// keep out one that it waits for: all blocks of earlier kernels have started by then.
//
// Data of earlier kernels must not come through pointers that are both const and __restrict__: a load through them may
// be moved to before the wait. Without overlap, and before sm_90, both functions do nothing.
__device__ __forceinline__ void let_next_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_for_earlier() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// What a kernel begins with that has nothing to do before its turn.
__device__ __forceinline__ void take_turn() {
    let_next_start();
    wait_for_earlier();
}

// Fast approximations of division and exponential: two units in the last place of a float, of which a half keeps 11
// bits and bfloat16 8. A gate below -88 gives exp = infinity and so a zero, as it should.
__device__ __forceinline__ float silu(float gate) { return __fdividef(gate, 1.0f + __expf(-gate)); }
