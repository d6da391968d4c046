// Products of few rows: out[rows, n] = x[rows, k] * weight[n, k]^T, at the rate at which memory gives the weights.
//
// The grid is one block a multiprocessor. A block (with SPLIT, a cluster of two) owns a stretch of consecutive outputs
// and takes them in passes of TILE weight rows; a pass is cut along k into chunks of DEPTH, and COPIERS warps copy chunk
// after chunk into a ring of stages in shared memory: pieces of weight rows of 2 * DEPTH consecutive bytes, by the bulk
// copy engine, and the same piece of every row of x. Eight warps multiply what has arrived. As weights never change,
// the ring is filled before the wait for the kernels in front (common.cuh): memory is kept busy while those finish.
//
// Matrix instructions take the weights as A and the rows of x as the eight columns of B. The order of k inside a sum
// is free as long as A and B agree: a lane reads 16 consecutive bytes of its weight row and of its row of x, whose four
// words are its fragments for two instructions. Stages' rows are 64 bytes longer than they are filled, so that the two
// rows that a quarter of a warp reads at once lie in different banks.
//
// The sums of the warps that share a tile, and of the two blocks of a cluster, each for half of k, are added in a fixed
// order: results are the same in every run. They may differ between numbers of rows, since kernels do.
//
// Launches, from sm_90 on (before, the kernels are empty): block 256 + 32 * COPIERS threads; grid `blocks`, a multiple of
// SPLIT, at most the outputs; dynamic shared memory
//     512 + 4 * (K_WARPS * MOST_ROWS * (TILE + 4) + (SPLIT - 1) * TILE * MOST_ROWS)
//       + stages * (TILE + rows) * (2 * DEPTH + 64)
// where K_WARPS = 128 / TILE and stages is 1 to 16. x and weight are aligned to 16 bytes, k is a multiple of 8, rows is
// 1 to MOST_ROWS.
//
//   kernel                     result
//   skinny_element_*           out = x * weight^T + bias, or no bias where its address is 0
//   skinny_f32_*               the same, in single precision
//   skinny_gated_*             weight is n gates, then n ups: out = silu(gate) * up, [rows, n]
//   skinny_rotated_*           weight is Q, K, V: Q rotated to out ([rows, (heads + 2 kv_heads) * head_dim]), K rotated
//                              and V to the rows' slots, what ops.cu's rotate_and_store does without norms. K and V of
//                              `out` are not written, nor are rows without a slot. The cache holds what activations are.
//   *_8, *_16, *_32            for up to so many rows; the shapes are at the end.
#include "barriers.cuh"
#include "skinny_results.cuh"
#include "skinny_transfers.cuh"

constexpr u32 WARPS = 8;    // that multiply
constexpr u32 STEP = 32;    // elements of k that a warp multiplies at a time

template <u32 TILE_, u32 MOST_ROWS_, u32 DEPTH_, u32 SPLIT_, u32 COPIERS_>
struct Shape {
    static constexpr u32 TILE = TILE_;
    static constexpr u32 MOST_ROWS = MOST_ROWS_;
    static constexpr u32 DEPTH = DEPTH_;
    static constexpr u32 SPLIT = SPLIT_;
    static constexpr u32 COPIERS = COPIERS_;  // warps that copy: one takes too long to start the copies of a chunk
    static constexpr u32 THREADS = (WARPS + COPIERS) * WARP;
    static constexpr u32 M_WARPS = TILE / 16;
    static constexpr u32 K_WARPS = WARPS / M_WARPS;
    static constexpr u32 N_TILES = MOST_ROWS / 8;
    static constexpr u32 STEPS = DEPTH / STEP / K_WARPS;  // of a warp in a whole chunk
    static constexpr u32 STRIDE = 2 * DEPTH + 64;
    // Four floats more than a column of sums, so that a warp's stores of two columns a lane meet no bank twice.
    static constexpr u32 SUM_STRIDE = TILE + 4;
    static constexpr u32 SUMS = K_WARPS * MOST_ROWS * SUM_STRIDE;
    static constexpr u32 INBOX = TILE / 2 * MOST_ROWS;    // sums that one block of a cluster sends to the other
    static_assert(TILE % 16 == 0 && WARPS % M_WARPS == 0 && MOST_ROWS % 8 == 0, "whole tiles");
    static_assert(STEPS * STEP * K_WARPS == DEPTH, "whole steps");
    static_assert(SPLIT == 1 || SPLIT == 2, "a cluster of two at most");
};

struct Operands {
    const u16* x;
    const u16* weight;
    u32 rows, k, stages;
};

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr u32 MULTIPLIERS = WARPS * WARP;
constexpr u32 MOST_STAGES = 16;
constexpr u32 HEADER = 512;  // bytes for barriers

// The warps that multiply, without those that copy.
__device__ __forceinline__ void sync_multipliers() { threads_sync<MULTIPLIERS>(1); }

__device__ __forceinline__ void multiply(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32." ACTIVATION "." ACTIVATION ".f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Where things lie in shared memory.
template <class S>
struct Memory {
    u32 base, stage_bytes;
    float* sums;
    float* inbox;

    __device__ __forceinline__ Memory(u8* memory, u32 rows)
        : base(shared_address(memory)),
          stage_bytes((S::TILE + rows) * S::STRIDE),
          sums(reinterpret_cast<float*>(memory + HEADER)),
          inbox(sums + S::SUMS) {}
    // A stage was filled; a stage was used; the other block's sums have come.
    __device__ __forceinline__ u32 full(u32 stage) const { return base + 8 * stage; }
    __device__ __forceinline__ u32 empty(u32 stage) const { return base + 8 * (MOST_STAGES + stage); }
    __device__ __forceinline__ u32 received(u32 box) const { return base + 8 * (2 * MOST_STAGES + box); }
    __device__ __forceinline__ u32 stage(u32 index) const {
        return base + HEADER + 4 * (S::SUMS + (S::SPLIT - 1) * 2 * S::INBOX) + index * stage_bytes;
    }
};

// A block's share: outputs [begin, end), chunks [first_chunk, last_chunk) of k.
struct Share {
    u32 begin, end, first_chunk, last_chunk;
};

// The warps that copy: one thread of each, every COPIERS-th row.
template <class S, class Result>
__device__ __forceinline__ void copy_all(const Operands& in, const Result& result, const Share& share,
                                         const Memory<S>& memory) {
    constexpr u32 OUTPUTS = S::TILE / Result::PARTS;
    const u32 copier = threadIdx.x / WARP - WARPS;
    const u64 policy = evict_first();
    const auto bytes_of = [&](u32 chunk) { return 2 * min(S::DEPTH, in.k - chunk * S::DEPTH); };
    // The copiers need not agree on when: until the first has arrived, with the number of bytes, the phase stays open.
    const auto copy_weights = [&](u32 stage, u32 output, u32 chunk) {
        const u32 present = min(OUTPUTS, share.end - output), bytes = bytes_of(chunk), barrier = memory.full(stage);
        if (copier == 0) barrier_expect(barrier, (present * Result::PARTS + in.rows) * bytes);
#pragma unroll
        for (u32 part = 0; part < Result::PARTS; ++part) {
            u32 to = memory.stage(stage) + (part * OUTPUTS + copier) * S::STRIDE;
#pragma unroll 4
            for (u32 at = copier; at < present; at += S::COPIERS, to += S::COPIERS * S::STRIDE) {
                const u64 from = u64(result.weight_row(output + at, part)) * in.k + chunk * S::DEPTH;
                copy_bulk_once(to, in.weight + from, bytes, barrier, policy);
            }
        }
    };
    const auto copy_x = [&](u32 stage, u32 chunk) {
        const u32 bytes = bytes_of(chunk), barrier = memory.full(stage);
        for (u32 row = copier; row < in.rows; row += S::COPIERS) {
            copy_bulk(memory.stage(stage) + (S::TILE + row) * S::STRIDE, in.x + u64(row) * in.k + chunk * S::DEPTH,
                      bytes, barrier);
        }
    };
    const u32 chunks = share.last_chunk - share.first_chunk;
    const u32 fills = (share.end - share.begin + OUTPUTS - 1) / OUTPUTS * chunks;
    const u32 early = min(fills, in.stages);
    u32 output = share.begin, chunk = share.first_chunk;
    const auto advance = [&] {
        if (++chunk == share.last_chunk) chunk = share.first_chunk, output += OUTPUTS;
    };
    for (u32 fill = 0; fill < early; ++fill) {
        copy_weights(fill, output, chunk);
        advance();
    }
    wait_for_earlier();
    for (u32 fill = 0, at = share.first_chunk; fill < early; ++fill) {
        copy_x(fill, at);
        if (++at == share.last_chunk) at = share.first_chunk;
    }
    for (u32 fill = early, stage = 0, parity = 0; fill < fills; ++fill) {
        barrier_wait(memory.empty(stage), parity);
        copy_weights(stage, output, chunk);
        copy_x(stage, chunk);
        advance();
        if (++stage == in.stages) stage = 0, parity ^= 1;
    }
}

// One chunk of a tile by one warp: every K_WARPS-th step. With WHOLE false, k ends inside the chunk, `left` elements
// in, and what lies behind is taken as zero.
template <class S, bool WHOLE>
__device__ __forceinline__ void multiply_chunk(float (&sums)[2][S::N_TILES][4], u32 weights, const u32 (&x)[S::N_TILES],
                                               u32 k_warp, u32 left) {
    const u32 lane_k = threadIdx.x % 4 * 8;
#pragma unroll
    for (u32 i = 0; i < S::STEPS; ++i) {
        const u32 step = i * S::K_WARPS + k_warp;
        if (!WHOLE && step * STEP >= left) break;
        const bool inside = WHOLE || step * STEP + lane_k < left;
        const Words4 none = {0, 0, 0, 0};
        const Words4 a = inside ? load_shared(weights + step * (2 * STEP)) : none;
        const Words4 b = inside ? load_shared(weights + 8 * S::STRIDE + step * (2 * STEP)) : none;
#pragma unroll
        for (u32 tile = 0; tile < S::N_TILES; ++tile) {
            const Words4 c = inside ? load_shared(x[tile] + step * (2 * STEP)) : none;
            multiply(sums[0][tile], a.x, b.x, a.y, b.y, c.x, c.y);
            multiply(sums[1][tile], a.z, b.z, a.w, b.w, c.z, c.w);
        }
    }
}

// The warps that multiply.
template <class S, class Result>
__device__ __forceinline__ void multiply_all(const Operands& in, const Result& result, const Share& share,
                                             const Memory<S>& memory, u32 rank) {
    constexpr u32 OUTPUTS = S::TILE / Result::PARTS, OWNED = OUTPUTS / S::SPLIT;
    const u32 warp = threadIdx.x / WARP, g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
    const u32 m_warp = warp % S::M_WARPS, k_warp = warp / S::M_WARPS;
    // Rows of x that are not there stand for columns of sums that nothing reads.
    u32 x_row[S::N_TILES];
#pragma unroll
    for (u32 tile = 0; tile < S::N_TILES; ++tile) {
        x_row[tile] = (S::TILE + min(8 * tile + g, in.rows - 1)) * S::STRIDE + 16 * t;
    }
    // The other block's barriers are ready once it has passed here, and nothing is sent before.
    if (S::SPLIT > 1) cluster_wait();
    u32 stage = 0, parity = 0, pass = 0;
    for (u32 output = share.begin; output < share.end; output += OUTPUTS, ++pass) {
        const u32 present = min(OUTPUTS, share.end - output);
        const u32 box = pass % 2;
        if (S::SPLIT > 1 && threadIdx.x == 0) {
            const u32 own = present > rank * OWNED ? min(OWNED, present - rank * OWNED) : 0;
            barrier_expect(memory.received(box), own * in.rows * Result::PARTS * 4);
        }
        float sums[2][S::N_TILES][4] = {};
        for (u32 chunk = share.first_chunk; chunk < share.last_chunk; ++chunk) {
            barrier_wait(memory.full(stage), parity);
            const u32 at = memory.stage(stage), weights = at + (16 * m_warp + g) * S::STRIDE + 16 * t;
            u32 x[S::N_TILES];
#pragma unroll
            for (u32 tile = 0; tile < S::N_TILES; ++tile) x[tile] = at + x_row[tile];
            const u32 left = in.k - chunk * S::DEPTH;
            if (left >= S::DEPTH) {
                multiply_chunk<S, true>(sums, weights, x, k_warp, left);
            } else {
                multiply_chunk<S, false>(sums, weights, x, k_warp, left);
            }
            // Every lane for its own reads: racecheck does not follow __syncwarp and one arrival, which would do as well.
            fence_async();
            barrier_arrive(memory.empty(stage));
            if (++stage == in.stages) stage = 0, parity ^= 1;
        }
        // Nobody reads the sums of the pass before any more.
        if (pass > 0) sync_multipliers();
#pragma unroll
        for (u32 tile = 0; tile < S::N_TILES; ++tile) {
            float* to = memory.sums + (k_warp * S::MOST_ROWS + 8 * tile + 2 * t) * S::SUM_STRIDE + 16 * m_warp + g;
#pragma unroll
            for (u32 i = 0; i < 4; ++i) {
                to[i % 2 * S::SUM_STRIDE + i / 2 * 8] = sums[0][tile][i] + sums[1][tile][i];
            }
        }
        sync_multipliers();
        const auto summed = [&](float(&sum)[Result::PARTS], u32 row, u32 at) {
#pragma unroll
            for (u32 part = 0; part < Result::PARTS; ++part) {
                const float* from = memory.sums + row * S::SUM_STRIDE + part * OUTPUTS + at;
                sum[part] = from[0];
#pragma unroll
                for (u32 i = 1; i < S::K_WARPS; ++i) sum[part] += from[i * S::MOST_ROWS * S::SUM_STRIDE];
            }
        };
        const u32 mine = rank * OWNED;
        float* inbox = memory.inbox + box * S::INBOX;
        if (S::SPLIT > 1) {
            const u32 other = rank ^ 1, theirs = other * OWNED;
            const u32 to = peer_address(shared_address(inbox), other);
            const u32 barrier = peer_address(memory.received(box), other);
            for (u32 i = threadIdx.x; i < OWNED * in.rows; i += MULTIPLIERS) {
                if (theirs + i % OWNED >= present) continue;
                float sum[Result::PARTS];
                summed(sum, i / OWNED, theirs + i % OWNED);
#pragma unroll
                for (u32 part = 0; part < Result::PARTS; ++part) {
                    send(to + 4 * (part * OWNED * S::MOST_ROWS + i), sum[part], barrier);
                }
            }
            barrier_wait_cluster(memory.received(box), pass / 2 % 2);
        }
        for (u32 i = threadIdx.x; i < OWNED * in.rows; i += MULTIPLIERS) {
            if (mine + i % OWNED >= present) continue;
            float sum[Result::PARTS];
            summed(sum, i / OWNED, mine + i % OWNED);
            if (S::SPLIT > 1) {
#pragma unroll
                for (u32 part = 0; part < Result::PARTS; ++part) {
                    // The same for both blocks of a cluster, which add two numbers in either order.
                    sum[part] += inbox[part * OWNED * S::MOST_ROWS + i];
                }
            }
            result(i / OWNED, output + mine + i % OWNED, sum);
        }
    }
}

template <class S, class Result>
__device__ __forceinline__ void product(const Operands& in, const Result& result) {
    extern __shared__ __align__(128) u8 dynamic[];
    const Memory<S> memory(dynamic, in.rows);
    let_next_start();
    const u32 rank = S::SPLIT > 1 ? cluster_rank() : 0;
    if (threadIdx.x == 0) {
        for (u32 stage = 0; stage < in.stages; ++stage) {
            barrier_init(memory.full(stage), 1);
            barrier_init(memory.empty(stage), MULTIPLIERS);
        }
        for (u32 box = 0; box < 2; ++box) barrier_init(memory.received(box), 1);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    if (S::SPLIT > 1) cluster_arrive();
    const u32 groups = gridDim.x / S::SPLIT, group = blockIdx.x / S::SPLIT;
    const u32 outputs = result.outputs(), chunks = (in.k + S::DEPTH - 1) / S::DEPTH;
    const Share share = {u32(u64(outputs) * group / groups), u32(u64(outputs) * (group + 1) / groups),
                         chunks * rank / S::SPLIT, chunks * (rank + 1) / S::SPLIT};
    const bool copies = threadIdx.x >= MULTIPLIERS;
    if (copies) {
        if (threadIdx.x % WARP == 0) copy_all<S>(in, result, share, memory);
    } else {
        wait_for_earlier();
        multiply_all<S>(in, result, share, memory, rank);
    }
}
#else
template <class S, class Result>
__device__ __forceinline__ void product(const Operands&, const Result&) {}
#endif

#define SKINNY_STORE(NAME, ELEMENT, CLUSTER, ...)                                                                      \
    extern "C" __global__ void CLUSTER __launch_bounds__(Shape<__VA_ARGS__>::THREADS, 1)                               \
        NAME(const u16* x, const u16* weight, const u16* bias, ELEMENT* out, u32 rows, u32 n, u32 k, u32 stages) {     \
        product<Shape<__VA_ARGS__>>({x, weight, rows, k, stages}, Store<ELEMENT>{out, bias, n});                       \
    }
#define SKINNY_GATED(NAME, CLUSTER, ...)                                                                               \
    extern "C" __global__ void CLUSTER __launch_bounds__(Shape<__VA_ARGS__>::THREADS, 1)                               \
        NAME(const u16* x, const u16* weight, u16* out, u32 rows, u32 n, u32 k, u32 stages) {                          \
        product<Shape<__VA_ARGS__>>({x, weight, rows, k, stages}, Gated{out, n});                                      \
    }
#define SKINNY_ROTATED(NAME, CLUSTER, ...)                                                                             \
    extern "C" __global__ void CLUSTER __launch_bounds__(Shape<__VA_ARGS__>::THREADS, 1)                               \
        NAME(const u16* x, const u16* weight, const u16* bias, u16* out, u32 rows, u32 k, u32 stages,                  \
             const float2* table, const u32* positions, const u32* slots, u16* keys, u16* values, u32 heads,           \
             u32 kv_heads, u32 head_dim) {                                                                             \
        product<Shape<__VA_ARGS__>>(                                                                                   \
            {x, weight, rows, k, stages},                                                                              \
            Rotated{out, bias, table, positions, slots, keys, values, heads, kv_heads, head_dim / 2});                 \
    }
#define SKINNY(ROWS, CLUSTER, ...)                                  \
    SKINNY_STORE(skinny_element_##ROWS, u16, CLUSTER, __VA_ARGS__)  \
    SKINNY_STORE(skinny_f32_##ROWS, float, CLUSTER, __VA_ARGS__)    \
    SKINNY_GATED(skinny_gated_##ROWS, CLUSTER, __VA_ARGS__)         \
    SKINNY_ROTATED(skinny_rotated_##ROWS, CLUSTER, __VA_ARGS__)

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define PAIRED __cluster_dims__(2, 1, 1)
#else
#define PAIRED
#endif
#define ALONE

//     rows         TILE, MOST_ROWS, DEPTH, SPLIT, COPIERS; kernels/src/cuda/skinny.rs has the same
SKINNY(8, ALONE, 32, 8, 512, 1, 4)
SKINNY(16, ALONE, 32, 16, 512, 1, 4)
SKINNY(32, PAIRED, 64, 32, 256, 2, 8)
