// Warpgroup matrix instructions (wgmma, sm_90a) of the shapes that attention_prefill_hopper.cuh multiplies.
//
// They run on their own from issue until a wait, so the compiler must neither move uses of their registers over the
// wait, nor changes of them over the fence before the issue: `hold` stands for a use and a change of each.
#pragma once
#include "attention_prefill_hopper_layout.cuh"

template <u32 TILES>
__device__ __forceinline__ void hold(float (&c)[TILES][4]) {
#pragma unroll
    for (u32 j = 0; j < TILES; ++j)
#pragma unroll
        for (u32 i = 0; i < 4; ++i) asm volatile("" : "+f"(c[j][i])::"memory");
}
template <u32 STEPS>
__device__ __forceinline__ void hold(u32 (&a)[STEPS][4]) {
#pragma unroll
    for (u32 j = 0; j < STEPS; ++j)
#pragma unroll
        for (u32 i = 0; i < 4; ++i) asm volatile("" : "+r"(a[j][i])::"memory");
}
__device__ __forceinline__ void matrix_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void matrix_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <u32 PENDING>
__device__ __forceinline__ void matrix_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Keeps the compiler from putting off, until after a wait that follows, what a sum of weights is computed from: there
// has to be something that depends on it before.
__device__ __forceinline__ void finish_before_wait(float sum) {
    asm volatile("{\n.reg .pred p;\nsetp.lt.f32 p, %0, 0f00000000;\n@p trap;\n}" ::"f"(sum) : "memory");
}

// Descriptor of a matrix in shared memory, a tile of TILE_ROWS, 128-byte swizzle: groups of 8 rows 1024 bytes apart,
// and, only of a matrix that is transposed, groups of 64 columns SPAN bytes apart.
template <u32 TILE_ROWS>
__device__ __forceinline__ u64 matrix_at(u32 address) {
    constexpr u64 FIXED = u64(1) << 62 | u64(1024 / 16) << 32 | u64(SPAN<TILE_ROWS> / 16) << 16;
    return FIXED | (address & 0x3FFFF) / 16;
}

#define C4(c, j) "+f"(c[j][0]), "+f"(c[j][1]), "+f"(c[j][2]), "+f"(c[j][3])
#define C16(c, j) C4(c, j), C4(c, j + 1), C4(c, j + 2), C4(c, j + 3)
#define C32(c, j) C16(c, j), C16(c, j + 4)
#define C64(c, j) C32(c, j), C32(c, j + 8)
#define R32                                                                                                       \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, "  \
    "%23, %24, %25, %26, %27, %28, %29, %30, %31"
#define R40 R32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define R48 R40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define R64                                                                                                        \
    R48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

#define R128                                                                                                       \
    R64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, "   \
        "%84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, " \
        "%104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, "   \
        "%121, %122, %123, %124, %125, %126, %127"

// c = a * b^T, or c += a * b^T: a of 64 rows, b of 128 or 64, 16 columns of both.
template <bool ADD>
__device__ __forceinline__ void multiply_rows(float (&c)[16][4], u64 a, u64 b) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %66, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32." MULTIPLIED "." MULTIPLIED " {" R64 "}, "
                 "%64, %65, p, 1, 1, 0, 0;\n}"
                 : C64(c, 0)
                 : "l"(a), "l"(b), "n"(ADD ? 1 : 0)
                 : "memory");
}
template <bool ADD>
__device__ __forceinline__ void multiply_rows(float (&c)[8][4], u64 a, u64 b) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %34, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32." MULTIPLIED "." MULTIPLIED " {" R32 "}, "
                 "%32, %33, p, 1, 1, 0, 0;\n}"
                 : C32(c, 0)
                 : "l"(a), "l"(b), "n"(ADD ? 1 : 0)
                 : "memory");
}

// c += a * b: a of 64 rows of 16 columns in registers, b of 16 rows and 256, 128, 96, 80 or 64 columns.
__device__ __forceinline__ void multiply_columns(float (&c)[32][4], const u32 (&a)[4], u64 b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n256k16.f32." MULTIPLIED "." MULTIPLIED " {" R128 "}, "
                 "{%128, %129, %130, %131}, %132, 1, 1, 1, 1;"
                 : C64(c, 0), C64(c, 16)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)
                 : "memory");
}
__device__ __forceinline__ void multiply_columns(float (&c)[16][4], const u32 (&a)[4], u64 b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." MULTIPLIED "." MULTIPLIED " {" R64 "}, "
                 "{%64, %65, %66, %67}, %68, 1, 1, 1, 1;"
                 : C64(c, 0)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)
                 : "memory");
}
__device__ __forceinline__ void multiply_columns(float (&c)[8][4], const u32 (&a)[4], u64 b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." MULTIPLIED "." MULTIPLIED " {" R32 "}, "
                 "{%32, %33, %34, %35}, %36, 1, 1, 1, 1;"
                 : C32(c, 0)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)
                 : "memory");
}
__device__ __forceinline__ void multiply_columns(float (&c)[10][4], const u32 (&a)[4], u64 b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n80k16.f32." MULTIPLIED "." MULTIPLIED " {" R40 "}, "
                 "{%40, %41, %42, %43}, %44, 1, 1, 1, 1;"
                 : C32(c, 0), C4(c, 8), C4(c, 9)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)
                 : "memory");
}
__device__ __forceinline__ void multiply_columns(float (&c)[12][4], const u32 (&a)[4], u64 b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n96k16.f32." MULTIPLIED "." MULTIPLIED " {" R48 "}, "
                 "{%48, %49, %50, %51}, %52, 1, 1, 1, 1;"
                 : C32(c, 0), C16(c, 8)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)
                 : "memory");
}
