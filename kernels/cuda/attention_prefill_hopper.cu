// Attention of many queries at a time on compute capability 9.0, for heads of 64 and 128 elements and a cache of what
// activations are: the work of attention_prefill.cuh, by warpgroup matrix instructions.
//
// Rows are stacked as there (row r of a sequence is query r / group and head r % group of the group), in tiles of 128.
// CTAs stay: each takes every gridDim.x-th piece of work (an item and a KV head), every other time from the other end,
// so that sorted work is dealt out evenly. Of three warpgroups, the first copies: queries into two buffers, tiles of
// keys and values into two rings, always as far ahead as there is room, over the bounds of items. The others compute
// 64 rows each. While the tensor cores multiply a tile of queries and keys, and the weights and values of the tile
// before it (perhaps of the item before), for one warpgroup, the other makes weights of its scores; they take turns.
//
// A row's sums run over tiles of fixed positions in order, and a tile it sees nothing of leaves it exactly as it was:
// its result does not depend on which rows share its CTA.
//
// Queries, keys and values lie in shared memory as the matrix instructions want them: each 64 columns (128 bytes) of a
// tile are an array of their own, of 128 rows one after another, in which the 16-byte piece c of row r is at piece
// c ^ (r % 8). Arrays start at multiples of 1024 bytes, so that this exclusive or is one of address bits.
#include "attention.cuh"

constexpr u32 WARPGROUP = 4 * WARP;
constexpr u32 CONSUMERS = 2;  // warpgroups that compute
constexpr u32 THREADS = (1 + CONSUMERS) * WARPGROUP;

// Only compiled to something for sm_90a: other cards have no such instructions, and are never given these kernels.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

constexpr u32 CONSUMER_WARPS = CONSUMERS * WARPGROUP / WARP;
constexpr u32 PRODUCER_WARPS = WARPGROUP / WARP;
constexpr u32 ROWS = CONSUMERS * 64;             // of queries; as the planner knows
constexpr u32 TILE = 128;                        // positions
constexpr u32 SPAN = 128 * 128;                  // bytes of 64 columns of a tile of 128 rows
constexpr u32 WARP_ROWS = 128 / PRODUCER_WARPS;  // of a tile, that one warp copies
static_assert(ROWS == 128 && TILE == 128 && WARP_ROWS == WARP, "one layout serves queries, keys and values");

struct Arguments {
    u16* out;          // [rows][heads][D]
    const u16* qkv;    // [rows][heads + 2 kv_heads][D]
    const u16* keys;   // [slots][kv_heads][D]
    const u16* values;
    const u32* starts;    // first table entry, or first slot, of each sequence
    const Words4* items;  // two each: (sequence, first query row, queries, context), (first row, first, end, unused)
    u32 heads;
    u32 kv_heads;
    u32 window;
    float scale_log2;
    u32 pieces;  // of work: items times KV heads
};

// What lies where in shared memory, from a multiple of 1024 bytes on. The launch reserves 1024 + END bytes.
template <u32 HEAD_DIM>
struct Shape {
    static constexpr u32 D = HEAD_DIM;
    static constexpr u32 STAGES = D == 128 ? 2 : 4;  // of keys, and of values; a power of two
    static constexpr u32 BYTES = D / 64 * SPAN;      // a tile
    static constexpr u32 KEYS = 2 * BYTES;           // after the queries
    static constexpr u32 VALUES = KEYS + STAGES * BYTES;
    static constexpr u32 WORK = VALUES + STAGES * BYTES;  // two Words4 for each buffer of queries
    static constexpr u32 BARRIERS = WORK + 2 * 32;
    // Barriers: something is there, and room is there.
    static constexpr u32 QUERIES_FULL = BARRIERS, QUERIES_FREE = QUERIES_FULL + 2 * 8;
    static constexpr u32 KEYS_FULL = QUERIES_FREE + 2 * 8, KEYS_FREE = KEYS_FULL + STAGES * 8;
    static constexpr u32 VALUES_FULL = KEYS_FREE + STAGES * 8, VALUES_FREE = VALUES_FULL + STAGES * 8;
    static constexpr u32 END = VALUES_FREE + STAGES * 8;
    static_assert(1024 + END <= 227 * 1024, "what a CTA may have");
};

// The piece of work of a CTA in round `round`.
__device__ __forceinline__ u32 piece_of(u32 round) {
    return round * gridDim.x + (round % 2 == 0 ? blockIdx.x : gridDim.x - 1 - blockIdx.x);
}

// Which of `count` places the n-th use of a ring falls on, and the parity of the phase that its being there completes.
template <u32 COUNT>
struct Place {
    u32 index;
    u32 parity;
    __device__ __forceinline__ Place(u32 n) : index(n % COUNT), parity(n / COUNT % 2) {}
};

// ---- Barriers ----

__device__ __forceinline__ void barrier_init(u32 barrier, u32 count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
__device__ __forceinline__ void barrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ bool barrier_test(u32 barrier, u32 parity) {
    u32 done;
    asm volatile("{\n.reg .pred p;\nmbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                 : "=r"(done)
                 : "r"(barrier), "r"(parity)
                 : "memory");
    return done != 0;
}
__device__ __forceinline__ bool barrier_try(u32 barrier, u32 parity) {
    u32 done;
    asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                 : "=r"(done)
                 : "r"(barrier), "r"(parity)
                 : "memory");
    return done != 0;
}
// Until the phase of this parity is complete; of a new barrier, the phase of parity 1 counts as complete.
__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
#if defined(BOUNDED_WAITS)  // development: a mistake gives wrong results, and does not hang the card
    // No trap: with one in both branches of the kernel, ptxas no longer sees that they have registers of their own.
    for (u32 tries = 0; tries < 1 << 15 && !barrier_try(barrier, parity); ++tries) {
    }
#else
    while (!barrier_try(barrier, parity)) {
    }
#endif
}
// What this thread wrote to shared memory is seen by matrix instructions that come after a barrier.
__device__ __forceinline__ void publish_writes() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Barriers by number among `threads` threads; whoever arrives does not wait.
template <u32 COUNT>
__device__ __forceinline__ void threads_sync(u32 number) {
    asm volatile("bar.sync %0, %1;" ::"r"(number), "n"(COUNT) : "memory");
}
template <u32 COUNT>
__device__ __forceinline__ void threads_arrive(u32 number) {
    asm volatile("bar.arrive %0, %1;" ::"r"(number), "n"(COUNT) : "memory");
}

template <u32 REGISTERS>
__device__ __forceinline__ void fewer_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <u32 REGISTERS>
__device__ __forceinline__ void more_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// ---- Matrix instructions ----
//
// They run on their own from issue until a wait, so the compiler must neither move uses of their registers over the
// wait, nor changes of them over the fence before the issue: `hold` stands for a use and a change of each.

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

// Descriptor of a matrix in shared memory, 128-byte swizzle: groups of 8 rows 1024 bytes apart, and, only of a matrix
// that is transposed, groups of 64 columns SPAN bytes apart.
__device__ __forceinline__ u64 matrix_at(u32 address) {
    constexpr u64 FIXED = u64(1) << 62 | u64(1024 / 16) << 32 | u64(SPAN / 16) << 16;
    return FIXED | (address & 0x3FFFF) / 16;
}

#define C4(c, j) "+f"(c[j][0]), "+f"(c[j][1]), "+f"(c[j][2]), "+f"(c[j][3])
#define C16(c, j) C4(c, j), C4(c, j + 1), C4(c, j + 2), C4(c, j + 3)
#define C32(c, j) C16(c, j), C16(c, j + 4)
#define R32                                                                                                       \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, "  \
    "%23, %24, %25, %26, %27, %28, %29, %30, %31"
#define R64                                                                                                        \
    R32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, "  \
        "%52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// c = a * b^T, or c += a * b^T: a of 64 rows, b of 128, 16 columns of both.
template <bool ADD>
__device__ __forceinline__ void multiply_rows(float (&c)[16][4], u64 a, u64 b) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %66, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32." ACTIVATION "." ACTIVATION " {" R64 "}, "
                 "%64, %65, p, 1, 1, 0, 0;\n}"
                 : C32(c, 0), C32(c, 8)
                 : "l"(a), "l"(b), "n"(ADD ? 1 : 0)
                 : "memory");
}

// c += a * b: a of 64 rows of 16 columns in registers, b of 16 rows and 128 or 64 columns.
__device__ __forceinline__ void multiply_columns(float (&c)[16][4], const u32 (&a)[4], u64 b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." ACTIVATION "." ACTIVATION " {" R64 "}, "
                 "{%64, %65, %66, %67}, %68, 1, 1, 1, 1;"
                 : C32(c, 0), C32(c, 8)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)
                 : "memory");
}
__device__ __forceinline__ void multiply_columns(float (&c)[8][4], const u32 (&a)[4], u64 b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." ACTIVATION "." ACTIVATION " {" R32 "}, "
                 "{%32, %33, %34, %35}, %36, 1, 1, 1, 1;"
                 : C32(c, 0)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)
                 : "memory");
}

__device__ __forceinline__ void store_shared(u32 address, u32 word) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(word) : "memory");
}
__device__ __forceinline__ Words4 load_shared(u32 address) {
    Words4 words;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
                 : "r"(address)
                 : "memory");
    return words;
}

// ---- Copying ----

// The copies of one warp, in order, of which the last may still be on its way. Matrix instructions may read what was
// copied only after a fence by the threads that copied it, when it is there.
struct Copies {
    u32 pending = 0;  // barrier to tell when the last is there

    __device__ __forceinline__ void tell() {
        publish_writes();
        __syncwarp();
        if (threadIdx.x % WARP == 0) barrier_arrive(pending);
    }
    __device__ __forceinline__ void finish() {
        if (pending == 0) return;
        copy_async_wait<0>();
        tell();
        pending = 0;
    }
    // Waits for room. If it must wait, what is on its way must not: the room may depend on it.
    __device__ __forceinline__ void wait_for_room(u32 barrier, u32 parity) {
        if (__all_sync(ALL_LANES, barrier_test(barrier, parity))) return;
        finish();
        barrier_wait(barrier, parity);
    }
    __device__ __forceinline__ void started(u32 barrier) {
        copy_async_commit();
        if (pending != 0) {
            copy_async_wait<1>();
            tell();
        }
        pending = barrier;
    }
};

// A warp starts copying 32 rows of D elements to its rows of a tile, lane i holding the number of row i; `rows` is this
// lane's piece of row 0. Rows without a number become zero: a weight of zero times what an unused slot may hold would
// not be zero if that is no number.
template <u32 D>
__device__ __forceinline__ void copy_rows(u32 tile, const u8* rows, u32 row_bytes, u32 number) {
    constexpr u32 PIECES = D / 8, AT_ONCE = WARP / PIECES;
    const u32 lane = threadIdx.x % WARP;
    const u32 row = lane / PIECES, piece = lane % PIECES;
    const u32 own = tile + threadIdx.x / WARP * (WARP_ROWS * 128);
    const u32 to = own + piece / 8 * SPAN + row * 128 + (piece % 8 ^ row) * 16;
#pragma unroll
    for (u32 first = 0; first < WARP_ROWS; first += AT_ONCE) {
        const u32 mine = __shfl_sync(ALL_LANES, number, int(first + row));
        const bool valid = mine != NO_SLOT;
        copy_async_16((to ^ first % 8 * 16) + first * 128, rows + u64(valid ? mine : 0) * row_bytes, valid);
    }
}

// Where a piece of work's item is.
__device__ __forceinline__ const Words4* item_of(const Arguments& args, u32 piece) {
    return args.items + piece / args.kv_heads * 2;
}

// The warpgroup that copies.
template <class S, class Addressing>
__device__ __forceinline__ void produce(const Arguments& args, const Addressing& addressing, u32 base) {
    constexpr u32 D = S::D, HEAD_BYTES = 2 * D;
    const u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const u32 lane_byte = lane % (D / 8) * 16;
    const u32 group = args.heads / args.kv_heads;
    Copies copies;
    u32 keys = 0, values = 0;  // tiles copied so far
    u32 piece = piece_of(0);  // there are no more CTAs than pieces
    Words4 head = *item_of(args, piece), body = item_of(args, piece)[1];
    u32 start = __ldg(args.starts + head.x);
    for (u32 round = 0; piece < args.pieces;) {
        const u32 kv_head = piece % args.kv_heads;
        const u32 from = body.y, end = body.z;
        const auto find = [&](u32 position) {
            return look_up<WARP>(addressing, start, position + warp * WARP_ROWS, from, end);
        };
        u32 position = from / TILE * TILE;
        Lookup found = find(position);

        const Place<2> room(round);
        copies.wait_for_room(base + S::QUERIES_FREE + room.index * 8, room.parity ^ 1);
        if (threadIdx.x == 0) {
            store_shared(base + S::WORK + room.index * 32, head);
            store_shared(base + S::WORK + room.index * 32 + 16, Words4{body.x, body.y, body.z, kv_head});
        }
        const u32 row = body.x + warp * WARP_ROWS + lane, query = row / group;
        const u32 of_row = kv_head * group + (row - query * group);
        const u32 number = (head.y + query) * (args.heads + 2 * args.kv_heads) + of_row;
        copy_rows<D>(base + room.index * S::BYTES, reinterpret_cast<const u8*>(args.qkv) + lane_byte, HEAD_BYTES,
                     row < head.z * group ? number : NO_SLOT);
        copies.started(base + S::QUERIES_FULL + room.index * 8);

        // The next item, which is needed when this one's last tile is on its way.
        piece = piece_of(++round);
        if (piece < args.pieces) {
            head = *item_of(args, piece);
            body = item_of(args, piece)[1];
        }

        const u32 head_byte = kv_head * HEAD_BYTES + lane_byte, slot_bytes = args.kv_heads * HEAD_BYTES;
        const auto copy_values = [&](u32 slot) {
            const Place<S::STAGES> room(values++);
            copies.wait_for_room(base + S::VALUES_FREE + room.index * 8, room.parity ^ 1);
            copy_rows<D>(base + S::VALUES + room.index * S::BYTES, reinterpret_cast<const u8*>(args.values) + head_byte,
                         slot_bytes, slot);
            copies.started(base + S::VALUES_FULL + room.index * 8);
        };
        // A tile's values are needed after the next tile's keys.
        u32 slot_before = 0;
        for (bool first = true; position < end; position += TILE, first = false) {
            const u32 slot = addressing.slot(found);
            found = find(position + TILE);
            const Place<S::STAGES> room(keys++);
            copies.wait_for_room(base + S::KEYS_FREE + room.index * 8, room.parity ^ 1);
            copy_rows<D>(base + S::KEYS + room.index * S::BYTES, reinterpret_cast<const u8*>(args.keys) + head_byte,
                         slot_bytes, slot);
            copies.started(base + S::KEYS_FULL + room.index * 8);
            if (!first) copy_values(slot_before);
            slot_before = slot;
        }
        if (piece < args.pieces) start = __ldg(args.starts + head.x);
        copy_values(slot_before);
    }
    copies.finish();
}

// ---- Computing ----

// A warp's 16 rows of the item that is computed on, as long as its queries' buffer is held.
struct Rows {
    u32 all_rows;
    u32 first;         // row of the sequence
    u32 before;        // positions before the first query
    u32 group;

    __device__ __forceinline__ u32 position(u32 row) const { return before + min(first + row, all_rows - 1) / group; }
};

// Which tiles a warp's rows see, and how much of them.
struct Sight {
    u32 position;    // of the tile
    u32 end;         // of the item
    u32 clear_from;  // tiles from here
    u32 clear_to;    // to here are seen by all rows
    u32 high[2];     // this lane's two rows see positions below
};

// Reads what the next item is. `row` is the warp's first.
template <class S>
__device__ __forceinline__ Sight next_item(const Arguments& args, u32 base, const Place<2>& queries, u32 row) {
    barrier_wait(base + S::QUERIES_FULL + queries.index * 8, queries.parity);
    const Words4 head = load_shared(base + S::WORK + queries.index * 32);
    const Words4 body = load_shared(base + S::WORK + queries.index * 32 + 16);
    const u32 group = args.heads / args.kv_heads;
    const Rows rows = {head.z * group, body.x, head.w - head.z, group};
    const u32 lane = threadIdx.x % WARP;
    Sight sight;
    sight.position = body.y / TILE * TILE;
    sight.end = body.z;
    sight.clear_from = window_start(rows.position(row + 15), args.window);
    sight.clear_to = rows.position(row) + 1;
    sight.high[0] = rows.position(row + lane / 4) + 1;
    sight.high[1] = rows.position(row + lane / 4 + 8) + 1;
    return sight;
}

// Issues scores = queries * keys^T.
template <class S>
__device__ __forceinline__ void score(float (&scores)[16][4], u32 queries, u32 keys) {
    const u64 a = matrix_at(queries), b = matrix_at(keys);
    multiply_rows<false>(scores, a, b);
#pragma unroll
    for (u32 k = 1; k < S::D / 16; ++k) {
        const u32 offset = (k / 4 * SPAN + k % 4 * 32) / 16;
        multiply_rows<true>(scores, a + offset, b + offset);
    }
    matrix_commit();
}

// Issues acc += weights * values.
template <u32 OUT_TILES>
__device__ __forceinline__ void add_values(float (&acc)[OUT_TILES][4], const u32 (&weights)[8][4], u32 values) {
    const u64 b = matrix_at(values);
#pragma unroll
    for (u32 k = 0; k < 8; ++k) multiply_columns(acc, weights[k], b + k * (16 * 128 / 16));
    matrix_commit();
}

// Scores become weights relative to the rows' greatest so far; `rescale` is what sums were multiplied by therefore.
__device__ __forceinline__ void make_weights(float (&scores)[16][4], Softmax& softmax, float (&rescale)[2],
                                             float scale_log2) {
    float base[2];
#pragma unroll
    for (u32 half = 0; half < 2; ++half) {
        float greatest[2] = {scores[0][2 * half], scores[0][2 * half + 1]};
#pragma unroll
        for (u32 j = 1; j < 16; ++j) {
            greatest[0] = fmaxf(greatest[0], scores[j][2 * half]);
            greatest[1] = fmaxf(greatest[1], scores[j][2 * half + 1]);
        }
        const float max = fmaxf(softmax.max[half], quad_max(fmaxf(greatest[0], greatest[1])) * scale_log2);
        base[half] = finite_max(max);
        rescale[half] = exp2_approx(softmax.max[half] - base[half]);
        softmax.max[half] = max;
        softmax.sum[half] *= rescale[half];
    }
#pragma unroll
    for (u32 j = 0; j < 16; ++j) {
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
            scores[j][i] = exp2_approx(fmaf(scores[j][i], scale_log2, -base[i / 2]));
            softmax.sum[i / 2] += scores[j][i];
        }
    }
}

__device__ __forceinline__ void round_weights(u32 (&weights)[8][4], const float (&scores)[16][4]) {
#pragma unroll
    for (u32 k = 0; k < 8; ++k) {
        weights[k][0] = Activation::pack(scores[2 * k][0], scores[2 * k][1]);
        weights[k][1] = Activation::pack(scores[2 * k][2], scores[2 * k][3]);
        weights[k][2] = Activation::pack(scores[2 * k + 1][0], scores[2 * k + 1][1]);
        weights[k][3] = Activation::pack(scores[2 * k + 1][2], scores[2 * k + 1][3]);
    }
}

template <u32 OUT_TILES>
__device__ __forceinline__ void multiply_all(float (&acc)[OUT_TILES][4], const float (&by)[2]) {
#pragma unroll
    for (u32 j = 0; j < OUT_TILES; ++j)
#pragma unroll
        for (u32 i = 0; i < 4; ++i) acc[j][i] *= by[i / 2];
}

// Divides by the sums of weights and writes the warp's rows, by way of the shared memory that held its queries, so that
// whole rows are written; then the queries' buffer is free.
template <class S>
__device__ __forceinline__ void store_rows(const Arguments& args, u32 base, u32 buffer, u32 warpgroup, u32 row,
                                           float (&acc)[S::D / 8][4], const float (&sums)[2]) {
    constexpr u32 PIECES = S::D / 8, AT_ONCE = WARP / PIECES;
    const u32 lane = threadIdx.x % WARP;
    const u32 tile = base + buffer * S::BYTES + row * 128;
    const Words4 head = load_shared(base + S::WORK + buffer * 32);
    const Words4 body = load_shared(base + S::WORK + buffer * 32 + 16);
    const float factors[2] = {__fdividef(1.0f, quad_sum(sums[0])), __fdividef(1.0f, quad_sum(sums[1]))};
    multiply_all(acc, factors);
    // The warpgroup has read its queries for the last time.
    threads_sync<WARPGROUP>(3 + warpgroup);
#pragma unroll
    for (u32 j = 0; j < PIECES; ++j) {
        const u32 to = tile + j / 8 * SPAN + lane / 4 * 128 + (j % 8 ^ lane / 4) * 16 + lane % 4 * 4;
        store_shared(to, pack(acc[j][0], acc[j][1]));
        store_shared(to + 8 * 128, pack(acc[j][2], acc[j][3]));
    }
    // Lane i finds out where row i of the warp goes.
    const u32 group = args.heads / args.kv_heads;
    const u32 mine = body.x + row + lane % 16, query = mine / group;
    u32 number = (head.y + query) * args.heads + body.w * group + (mine - query * group);
    if (mine >= head.z * group) number = NO_SLOT;
    __syncwarp();
    const u32 lane_row = lane / PIECES, piece = lane % PIECES;
    const u32 from = tile + piece / 8 * SPAN + lane_row * 128 + (piece % 8 ^ lane_row) * 16;
#pragma unroll
    for (u32 first = 0; first < 16; first += AT_ONCE) {
        const u32 to = __shfl_sync(ALL_LANES, number, int(first + lane_row));
        const Words4 words = load_shared((from ^ first % 8 * 16) + first * 128);
        if (to != NO_SLOT) *reinterpret_cast<Words4*>(args.out + u64(to) * S::D + piece * 8) = words;
    }
    __syncwarp();
    if (lane == 0) barrier_arrive(base + S::QUERIES_FREE + buffer * 8);
}

// One of the two warpgroups that compute; `warp` is one of its four.
template <class S>
__device__ __forceinline__ void consume(const Arguments& args, u32 base, u32 warpgroup, u32 warp) {
    const u32 row = warpgroup * 64 + warp * 16;  // the warp's first
    const u32 queries = base + warpgroup * (64 * 128);
    const bool leads = threadIdx.x % WARP == 0;
    u32 round = 0;
    // Whose turn it is to issue: the first warpgroup's.
    if (warpgroup == 1) threads_arrive<2 * WARPGROUP>(1);

    float scores[16][4];
    float acc[S::D / 8][4] = {};
    u32 weights[8][4];
    Softmax softmax;
    float rescale[2];
    const auto weigh = [&](const Sight& sight) {
        if (sight.position < sight.clear_from || sight.position + TILE > sight.clear_to) {
            Visible visible;
#pragma unroll
            for (u32 half = 0; half < 2; ++half) {
                visible.low[half] = window_start(sight.high[half] - 1, args.window);
                visible.high[half] = sight.high[half];
            }
            hide(scores, visible, sight.position);
        }
        make_weights(scores, softmax, rescale, args.scale_log2);
    };

    Sight sight = next_item<S>(args, base, Place<2>(0), row);
    barrier_wait(base + S::KEYS_FULL, 0);
    hold(scores);
    matrix_fence();
    score<S>(scores, queries, base + S::KEYS);
    matrix_wait<0>();
    hold(scores);
    if (leads) barrier_arrive(base + S::KEYS_FREE);
    weigh(sight);
    round_weights(weights, scores);

    u32 tiles = 0;  // computed completely
    for (;; ++tiles) {
        // The scores of the next tile, and the values of this one.
        sight.position += TILE;
        // A vote tells the compiler that the warp goes one way.
        const bool ends = __any_sync(ALL_LANES, sight.position >= sight.end);
        if (ends) {
            if (piece_of(round + 1) >= args.pieces) break;
            ++round;
            sight = next_item<S>(args, base, Place<2>(round), row);
        }
        const Place<S::STAGES> key_place(tiles + 1), value_place(tiles);
        barrier_wait(base + S::KEYS_FULL + key_place.index * 8, key_place.parity);
        threads_sync<2 * WARPGROUP>(1 + warpgroup);
        hold(scores);
        hold(acc);
        hold(weights);
        matrix_fence();
        score<S>(scores, queries + round % 2 * S::BYTES, base + S::KEYS + key_place.index * S::BYTES);
        barrier_wait(base + S::VALUES_FULL + value_place.index * 8, value_place.parity);
        matrix_fence();  // ptxas would put one after the loop above by itself, but only where it waits for all before
        add_values(acc, weights, base + S::VALUES + value_place.index * S::BYTES);
        threads_arrive<2 * WARPGROUP>(2 - warpgroup);

        matrix_wait<1>();
        hold(scores);
        if (leads) barrier_arrive(base + S::KEYS_FREE + key_place.index * 8);
        const float sums[2] = {softmax.sum[0], softmax.sum[1]};
        if (ends) softmax = Softmax();
        weigh(sight);
        finish_before_wait(softmax.sum[0] + softmax.sum[1]);
        matrix_wait<0>();
        hold(acc);
        hold(weights);
        if (leads) barrier_arrive(base + S::VALUES_FREE + value_place.index * 8);
        round_weights(weights, scores);
        if (ends) {
            store_rows<S>(args, base, (round - 1) % 2, warpgroup, row, acc, sums);
#pragma unroll
            for (u32 j = 0; j < S::D / 8; ++j)
#pragma unroll
                for (u32 i = 0; i < 4; ++i) acc[j][i] = 0.0f;
        } else if (__any_sync(ALL_LANES, rescale[0] != 1.0f || rescale[1] != 1.0f)) {
            multiply_all(acc, rescale);
        }
    }
    const Place<S::STAGES> value_place(tiles);
    barrier_wait(base + S::VALUES_FULL + value_place.index * 8, value_place.parity);
    hold(acc);
    hold(weights);
    matrix_fence();
    add_values(acc, weights, base + S::VALUES + value_place.index * S::BYTES);
    matrix_wait<0>();
    hold(acc);
    const float sums[2] = {softmax.sum[0], softmax.sum[1]};
    store_rows<S>(args, base, round % 2, warpgroup, row, acc, sums);
}

template <class S, class Addressing>
__device__ __forceinline__ void prefill(const Arguments& args, const Addressing& addressing) {
    extern __shared__ __align__(1024) u8 memory[];
    const u32 base = (shared_address(memory) + 1023) / 1024 * 1024;
    if (threadIdx.x == 0) {
        for (u32 i = 0; i < 2; ++i) {
            barrier_init(base + S::QUERIES_FULL + i * 8, PRODUCER_WARPS);
            barrier_init(base + S::QUERIES_FREE + i * 8, CONSUMER_WARPS);
        }
        for (u32 i = 0; i < S::STAGES; ++i) {
            barrier_init(base + S::KEYS_FULL + i * 8, PRODUCER_WARPS);
            barrier_init(base + S::KEYS_FREE + i * 8, CONSUMER_WARPS);
            barrier_init(base + S::VALUES_FULL + i * 8, PRODUCER_WARPS);
            barrier_init(base + S::VALUES_FREE + i * 8, CONSUMER_WARPS);
        }
    }
    __syncthreads();
    const u32 warp = __shfl_sync(ALL_LANES, threadIdx.x / WARP, 0);
    if (warp < PRODUCER_WARPS) {
        fewer_registers<56>();
        produce<S>(args, addressing, base);
    } else {
        more_registers<224>();
        consume<S>(args, base, warp / 4 - 1, warp % 4);
    }
}

#define BODY(D, ADDRESSING)                                                                                        \
    const Arguments args = {out,   qkv,      keys,   values,          starts, items,                               \
                            heads, kv_heads, window, scale * LOG2_E, pieces};                                      \
    prefill<Shape<D>>(args, ADDRESSING(tables, block_size));
#else
#define BODY(D, ADDRESSING)
#endif

// KV names what the cache holds.
#define PREFILL(KV, D, NAME, ADDRESSING)                                                                           \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) attention_prefill_hopper_##KV##_d##D##_##NAME(        \
        u16* out, const u16* qkv, const u16* keys, const u16* values, const u32* tables, const u32* starts,        \
        const Words4* items, u32 heads, u32 kv_heads, u32 block_size, u32 window, float scale, u32 pieces) {       \
        BODY(D, ADDRESSING)                                                                                        \
    }

#define PREFILL_ALL(KV)                      \
    PREFILL(KV, 64, paged, Paged)            \
    PREFILL(KV, 64, contiguous, Contiguous)  \
    PREFILL(KV, 128, paged, Paged)           \
    PREFILL(KV, 128, contiguous, Contiguous)

#if defined(ACTIVATIONS_F16)
PREFILL_ALL(f16)
#else
PREFILL_ALL(bf16)
#endif
