// Attention of few queries against long contexts: the heads of a KV head's group, times the queries of one sequence,
// are the up to 16 rows of every matrix product, and the context is divided among CTAs and their warps.
//
// Work is a list of items, each a range of one sequence's positions, and for every team of CTAs a run of that list. A
// team has one CTA for each KV head (times the pieces of 16 rows of a large group), so that CTAs that run at one time
// read neighbouring bytes. The list is read from memory: a captured launch serves any batch.
//
// Inside a CTA every warp takes every fourth tile of 16 positions, by the position's own number. Each warp has a
// pipeline of its own, which runs on through item after item: the next item's first tiles are on their way while the
// last one's results are being merged.
#pragma once
#include "attention.cuh"

constexpr u32 WARPS = 4;
constexpr u32 THREADS = WARPS * WARP;
constexpr u32 TILE = 16;           // positions a warp handles at a time
constexpr u32 STEP = WARPS * TILE;  // from one tile of a warp to its next
constexpr u32 MAX_ROWS = 16;
constexpr u32 MERGE_ROWS = 8;  // rows merged at a time

// Tiles that a warp has room for: one is computed on, the other is on its way. With more, more of memory's pages are
// open at a time, which costs more than the deeper pipeline gains (measured on an H100). Of the longest rows there is
// room for one: two would take more shared memory than some cards have, and where there is more, a second CTA runs
// beside the first and computes while the first one's tiles are on their way.
template <u32 ROW_BYTES>
constexpr u32 STAGES_OF = ROW_BYTES <= 256 ? 2 : 1;

struct Arguments {
    u16* out;          // [rows][heads][D]
    const u16* qkv;    // [rows][heads + 2 kv_heads][D]
    const u8* keys;    // [slots][kv_heads][D], of the type that the cache holds
    const u8* values;
    const u32* tables;
    const u32* starts;    // first table entry, or first slot, of each sequence
    const Words4* items;  // two each: (sequence, first query row, queries, context), (first, end, split, partial row)
    const u32* teams;     // first item of each team, and one past the last of all
    float* partial_sums;     // [partial row][kv_heads][D]
    float2* partial_stats;   // [partial row][kv_heads]: greatest score, sum of weights
    u32* arrivals;           // [sequence][CTAs of a team]: zero before and after every launch
    u32 heads;
    u32 kv_heads;
    u32 window;
    float scale_log2;
};

// One CTA's rows of one item.
struct Task {
    Words4 head;
    Words4 body;
    u32 kv_head;
    u32 group;
    u32 first_row;  // of the sequence's queries x group rows
    u32 all_rows;
    u32 rows;

    __device__ __forceinline__ Task(const Arguments& args, u32 item, u32 kv_head, u32 first_row)
        : head(args.items[2 * item]),
          body(args.items[2 * item + 1]),
          kv_head(kv_head),
          group(args.heads / args.kv_heads),
          first_row(first_row) {
        all_rows = head.z * group;
        rows = min(all_rows - first_row, MAX_ROWS);
    }
    __device__ __forceinline__ u32 splits() const { return body.z >> 16; }
    __device__ __forceinline__ u32 split() const { return body.z & 0xFFFF; }
    __device__ __forceinline__ u32 query(u32 row) const { return (first_row + row) / group; }
    // Row and head of a row, as an index of [rows][heads_per_row].
    __device__ __forceinline__ u64 at(u32 row, u32 heads_per_row) const {
        const u32 query = this->query(row);
        return u64(head.y + query) * heads_per_row + kv_head * group + (first_row + row - query * group);
    }
    __device__ __forceinline__ u64 partial(u32 split, u32 row, u32 kv_heads) const {
        return u64(body.w + split * all_rows + first_row + row) * kv_heads + kv_head;
    }
};

// First tile of this warp that ends after position `first`.
__device__ __forceinline__ u32 first_tile(u32 first) {
    const u32 tile = first / TILE, warp = threadIdx.x / WARP;
    return (tile + (warp - tile) % WARPS) * TILE;
}

// The tile that is to be copied next, through all of the CTA's items.
template <class Addressing>
struct Cursor {
    const Arguments& args;
    Addressing addressing;
    u32 item, last;
    u32 position, first, end, start;
    Lookup found;

    __device__ __forceinline__ Cursor(const Arguments& args, Addressing addressing, u32 item, u32 last)
        : args(args), addressing(addressing), item(item), last(last) {
        enter();
    }
    // Goes to the first tile of this warp in `item` or, if it has none there, in the items after.
    __device__ __forceinline__ void enter() {
        for (; item < last; ++item) {
            const Words4 body = args.items[2 * item + 1];
            first = body.x;
            end = body.y;
            position = first_tile(first);
            if (position < end) {
                start = args.starts[args.items[2 * item].x];
                found = look_up<TILE>(addressing, start, position, first, end);
                return;
            }
        }
    }
    __device__ __forceinline__ void advance() {
        position += STEP;
        if (position < end) {
            found = look_up<TILE>(addressing, start, position, first, end);
        } else {
            ++item;
            enter();
        }
    }
};

template <u32 D>
struct alignas(16) Merge {
    // Columns merged at a time, and a row's stride: eight floats more, so that the rows that a half warp writes at
    // once are in different banks.
    static constexpr u32 COLUMNS = D % 64 == 0 ? 64 : D;
    static constexpr u32 STRIDE = COLUMNS + 8;
    static_assert(STRIDE % 32 == 8 || STRIDE % 32 == 24, "four rows in different banks");
    float sums[WARPS][MERGE_ROWS][STRIDE];
    float2 stats[WARPS][MAX_ROWS];
    float2 total[MAX_ROWS];
    u32 is_last[4];
};

__device__ __forceinline__ float4 load_uncached(const float4* from) {
    float4 x;
    asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w) : "l"(from));
    return x;
}
__device__ __forceinline__ float2 load_uncached(const float2* from) {
    float2 x;
    asm volatile("ld.global.cg.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "l"(from));
    return x;
}

template <u32 D>
__device__ __forceinline__ void store_row(const Arguments& args, const Task& task, u32 row, u32 column, float4 sums,
                                          float factor) {
    uint2 packed;
    packed.x = pack(sums.x * factor, sums.y * factor);
    packed.y = pack(sums.z * factor, sums.w * factor);
    *reinterpret_cast<uint2*>(args.out + task.at(row, args.heads) * D + column) = packed;
}

// This lane's part of 16 rows of queries; rows that do not exist are zero. Against a cache of bytes, where this lane has
// four columns in a row of each 16 (see `score`), they are those.
template <class Kv, u32 D>
__device__ __forceinline__ void load_queries(u32 (&q)[D / 16][4], const Arguments& args, const Task& task) {
    constexpr u32 OWN = Kv::BYTES == 1 ? 4 : 2, NEXT = Kv::BYTES == 1 ? 2 : 8;
    const u32 lane = threadIdx.x % WARP;
#pragma unroll
    for (u32 half = 0; half < 2; ++half) {
        const u32 row = lane / 4 + 8 * half;
        const bool exists = row < task.rows;
        const u16* at = args.qkv + task.at(exists ? row : 0, args.heads + 2 * args.kv_heads) * D + lane % 4 * OWN;
#pragma unroll
        for (u32 k = 0; k < D / 16; ++k) {
            q[k][half] = exists ? Kv::query(*reinterpret_cast<const u32*>(at + 16 * k)) : 0;
            q[k][half + 2] = exists ? Kv::query(*reinterpret_cast<const u32*>(at + 16 * k + NEXT)) : 0;
        }
    }
}

// What this lane's two rows see of the item. Found anew where it is needed, in few tiles: registers are scarcer.
__device__ __forceinline__ Visible visible_rows(const Task& task, u32 window) {
    Visible visible;
    const u32 before = task.head.w - task.head.z;
#pragma unroll
    for (u32 half = 0; half < 2; ++half) {
        const u32 row = threadIdx.x % WARP / 4 + 8 * half;
        const u32 position = before + task.query(row < task.rows ? row : 0);
        visible.low[half] = max(task.body.x, window_start(position, window));
        visible.high[half] = min(task.body.y, position + 1);
    }
    return visible;
}

// Scores of 16 positions. A matrix load moves pairs of bytes as if each were one number: of 16 bytes of a row a lane
// gets four in a row, where of 16 halves in two loads it gets columns 2t, 2t+1, 2t+8, 2t+9. Both factors of a product
// may take their columns in any one order, so with bytes the queries are loaded in theirs.
template <class Kv, u32 D>
__device__ __forceinline__ void score(float (&scores)[TILE / 8][4], const u32 (&q)[D / 16][4], u32 keys) {
    constexpr u32 STRIDE = HeadRow<Kv::BYTES, D>::STRIDE;
    if constexpr (Kv::BYTES == 1) {
#pragma unroll
        for (u32 k = 0; k < D / 16; k += 2) {
            const bool both = k + 1 < D / 16;  // else the right tiles are the left ones again, and not used
            u32 b[4];
            load_tiles(b, keys + (both ? lane_offset_by_row<STRIDE>() : lane_offset_by_row<STRIDE, 0>()) + k * 16);
            Kv::multiply(scores[0], q[k], widen_e4m3(b[0]), widen_e4m3(b[0] >> 16));
            Kv::multiply(scores[1], q[k], widen_e4m3(b[2]), widen_e4m3(b[2] >> 16));
            if (!both) break;
            Kv::multiply(scores[0], q[k + 1], widen_e4m3(b[1]), widen_e4m3(b[1] >> 16));
            Kv::multiply(scores[1], q[k + 1], widen_e4m3(b[3]), widen_e4m3(b[3] >> 16));
        }
    } else {
#pragma unroll
        for (u32 k = 0; k < D / 16; ++k) {
            u32 b[4];
            load_tiles(b, keys + lane_offset_by_row<STRIDE>() + k * 32);
            Kv::multiply(scores[0], q[k], b[0], b[1]);
            Kv::multiply(scores[1], q[k], b[2], b[3]);
        }
    }
}

// acc += weights * values of 16 positions that lie as bytes. Transposed in pairs, a lane has two positions' numbers of
// two neighbouring columns: the even ones go to one tile of the output and the odd ones to the next (see `finish`).
template <class Kv, u32 D>
__device__ __forceinline__ void add_bytes(float (&acc)[D / 8][4], const float (&weights)[TILE / 8][4], u32 values) {
    constexpr u32 STRIDE = HeadRow<1, D>::STRIDE;
    const u32 a[4] = {Kv::pack(weights[0][0], weights[0][1]), Kv::pack(weights[0][2], weights[0][3]),
                      Kv::pack(weights[1][0], weights[1][1]), Kv::pack(weights[1][2], weights[1][3])};
#pragma unroll
    for (u32 j = 0; j < D / 16; j += 2) {
        const bool both = j + 1 < D / 16;
        u32 v[4];
        load_tiles_transposed(
            v, values + (both ? lane_offset_by_column<STRIDE>() : lane_offset_by_column<STRIDE, 0>()) + j * 16);
#pragma unroll
        for (u32 i = 0; i < (both ? 2 : 1); ++i) {
            const u32 low = v[2 * i], high = v[2 * i + 1];
            Kv::multiply(acc[2 * (j + i)], a, widen_e4m3(__byte_perm(low, 0, 0x20)),
                         widen_e4m3(__byte_perm(high, 0, 0x20)));
            Kv::multiply(acc[2 * (j + i) + 1], a, widen_e4m3(__byte_perm(low, 0, 0x31)),
                         widen_e4m3(__byte_perm(high, 0, 0x31)));
        }
    }
}

// One tile of 16 positions.
template <class Kv, u32 D>
__device__ __forceinline__ void attend(float (&acc)[1][D / 8][4], Softmax& softmax, const u32 (&q)[D / 16][4],
                                       u32 keys, u32 values, const Arguments& args, const Task& task, u32 position,
                                       bool all_seen) {
    constexpr u32 STRIDE = HeadRow<Kv::BYTES, D>::STRIDE;
    float scores[1][TILE / 8][4] = {};
    score<Kv, D>(scores[0], q, keys);
    if (!all_seen) hide(scores[0], visible_rows(task, args.window), position);
    weigh(scores[0], acc[0], softmax, args.scale_log2);
    if constexpr (Kv::BYTES == 1) {
        add_bytes<Kv, D>(acc[0], scores[0], values);
    } else {
        add_values<Kv, STRIDE>(acc, scores, values + lane_offset_by_column<STRIDE>());
    }
}

// The last CTA of a sequence and KV head adds up what all of them left, in the order of the splits.
template <u32 D>
__device__ __forceinline__ void combine(Merge<D>& shared, const Arguments& args, const Task& task) {
    const u32 lane = threadIdx.x % WARP;
    for (u32 row = threadIdx.x / WARP; row < task.rows; row += WARPS) {
        float max = NEG_INFINITY, sum = 0.0f;
        for (u32 split = lane; split < task.splits(); split += WARP)
            max = fmaxf(max, load_uncached(args.partial_stats + task.partial(split, row, args.kv_heads)).x);
        max = warp_max(max);
        for (u32 split = lane; split < task.splits(); split += WARP) {
            const float2 stats = load_uncached(args.partial_stats + task.partial(split, row, args.kv_heads));
            sum += stats.y * exp2_approx(stats.x - max);
        }
        sum = warp_sum(sum);
        if (lane == 0) shared.total[row] = make_float2(max, 1.0f / sum);
    }
    __syncthreads();
    for (u32 unit = threadIdx.x; unit < task.rows * (D / 4); unit += THREADS) {
        const u32 row = unit / (D / 4), column = unit % (D / 4) * 4;
        const float2 total = shared.total[row];
        float4 sums = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 8
        for (u32 split = 0; split < task.splits(); ++split) {
            const u64 at = task.partial(split, row, args.kv_heads);
            const float weight = exp2_approx(load_uncached(args.partial_stats + at).x - total.x);
            const float4 part = load_uncached(reinterpret_cast<const float4*>(args.partial_sums + at * D + column));
            sums.x = fmaf(part.x, weight, sums.x);
            sums.y = fmaf(part.y, weight, sums.y);
            sums.z = fmaf(part.z, weight, sums.z);
            sums.w = fmaf(part.w, weight, sums.w);
        }
        store_row<D>(args, task, row, column, sums, total.y);
    }
    __syncthreads();
}

// Eight rows' sums of the four warps, already relative to the rows' common greatest score: added up and written.
template <u32 D>
__device__ __forceinline__ void emit(Merge<D>& shared, const Arguments& args, const Task& task, u32 first_row,
                                     u32 first_column) {
    constexpr u32 PIECES = Merge<D>::COLUMNS / 4;
    for (u32 unit = threadIdx.x; unit < MERGE_ROWS * PIECES; unit += THREADS) {
        const u32 row = first_row + unit / PIECES, column = unit % PIECES * 4;
        if (row >= task.rows) return;
        float4 sums = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
        for (u32 warp = 0; warp < WARPS; ++warp) {
            const float4 part = *reinterpret_cast<const float4*>(&shared.sums[warp][unit / PIECES][column]);
            sums.x += part.x;
            sums.y += part.y;
            sums.z += part.z;
            sums.w += part.w;
        }
        const float2 total = shared.total[row];
        if (task.splits() == 1) {
            store_row<D>(args, task, row, first_column + column, sums, 1.0f / total.y);
        } else {
            const u64 at = task.partial(task.split(), row, args.kv_heads);
            *reinterpret_cast<float4*>(args.partial_sums + at * D + first_column + column) = sums;
            if (first_column + column == 0) args.partial_stats[at] = total;
        }
    }
}

// This lane's columns of one row, from `column` on.
template <class Kv, u32 D>
__device__ __forceinline__ void write_sums(float* row, const float (&acc)[D / 8][4], u32 column, u32 half, float factor) {
    const u32 t = threadIdx.x % 4;
    if constexpr (Kv::BYTES == 1) {
        // Columns 4t and 4t+2 of 16 are in the tile of the even ones, 4t+1 and 4t+3 in that of the odd ones.
#pragma unroll
        for (u32 j = 0; j < Merge<D>::COLUMNS / 16; ++j) {
            const float(&even)[4] = acc[column / 8 + 2 * j];
            const float(&odd)[4] = acc[column / 8 + 2 * j + 1];
            *reinterpret_cast<float4*>(row + 16 * j + 4 * t) =
                make_float4(even[2 * half] * factor, odd[2 * half] * factor, even[2 * half + 1] * factor,
                            odd[2 * half + 1] * factor);
        }
    } else {
#pragma unroll
        for (u32 j = 0; j < Merge<D>::COLUMNS / 8; ++j) {
            const float(&c)[4] = acc[column / 8 + j];
            *reinterpret_cast<float2*>(row + 8 * j + 2 * t) = make_float2(c[2 * half] * factor, c[2 * half + 1] * factor);
        }
    }
}

// Merges the four warps' results of an item, in the order of the warps, and writes them.
template <class Kv, u32 D>
__device__ __forceinline__ void finish(Merge<D>& shared, const Arguments& args, const Task& task,
                                       const float (&acc)[D / 8][4], const Softmax& softmax, u32* arrivals) {
    const u32 warp = threadIdx.x / WARP, g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
#pragma unroll
    for (u32 half = 0; half < 2; ++half) {
        const float sum = quad_sum(softmax.sum[half]);
        if (t == 0) shared.stats[warp][g + 8 * half] = make_float2(softmax.max[half], sum);
    }
    __syncthreads();
    float rescale[2];
#pragma unroll
    for (u32 half = 0; half < 2; ++half) {
        float max = NEG_INFINITY, sum = 0.0f;
#pragma unroll
        for (u32 w = 0; w < WARPS; ++w) max = fmaxf(max, shared.stats[w][g + 8 * half].x);
        const float base = finite_max(max);
#pragma unroll
        for (u32 w = 0; w < WARPS; ++w) {
            const float2 stats = shared.stats[w][g + 8 * half];
            sum += stats.y * exp2_approx(stats.x - base);
        }
        rescale[half] = exp2_approx(softmax.max[half] - base);
        if (warp == 0 && t == 0) shared.total[g + 8 * half] = make_float2(max, sum);
    }
#pragma unroll
    for (u32 half = 0; half < 2; ++half) {
        if (half * MERGE_ROWS >= task.rows) break;
#pragma unroll
        for (u32 column = 0; column < D; column += Merge<D>::COLUMNS) {
            write_sums<Kv, D>(&shared.sums[warp][g][0], acc, column, half, rescale[half]);
            __syncthreads();
            emit<D>(shared, args, task, half * MERGE_ROWS, column);
            __syncthreads();
        }
    }
    if (task.splits() == 1) return;
    // Every thread's part must be visible to all before this CTA counts as arrived. The counter wraps to zero with the
    // last arrival, ready for the next launch.
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) shared.is_last[0] = atomicInc(arrivals, task.splits() - 1) == task.splits() - 1;
    __syncthreads();
    if (shared.is_last[0] == 0) return;
    __threadfence();
    combine<D>(shared, args, task);
}

template <class Kv, u32 D, class Addressing>
__device__ __forceinline__ void decode(const Arguments& args, const Addressing& addressing) {
    take_turn();
    using Row = HeadRow<Kv::BYTES, D>;
    constexpr u32 TILE_BYTES = TILE * Row::STRIDE, STAGES = STAGES_OF<D * Kv::BYTES>;
    extern __shared__ __align__(16) u8 memory[];
    Merge<D>& shared = *reinterpret_cast<Merge<D>*>(memory + WARPS * STAGES * 2 * TILE_BYTES);
    const u32 stages = shared_address(memory) + threadIdx.x / WARP * (STAGES * 2 * TILE_BYTES);

    const u32 pieces = (args.heads / args.kv_heads + MAX_ROWS - 1) / MAX_ROWS;
    const u32 team_size = args.kv_heads * pieces;
    const u32 team = blockIdx.x / team_size, member = blockIdx.x % team_size;
    const u32 kv_head = member / pieces;
    const u32 first_item = args.teams[team], last_item = args.teams[team + 1];
    const HeadCache cache = HeadCache::of<Kv, D>(args.keys, args.values, args.kv_heads, kv_head);

    Cursor<Addressing> cursor(args, addressing, first_item, last_item);
    // Queues the next tile, if there is one; a group is committed in any case, so that counting groups counts tiles.
    const auto copy_next = [&](u32 stage) {
        if (cursor.item < last_item) {
            const u32 to = stages + stage * (2 * TILE_BYTES);
            copy_rows<Row, TILE>(to, to + TILE_BYTES, cache, addressing.slot(cursor.found));
            cursor.advance();
        }
        copy_async_commit();
    };
#pragma unroll
    for (u32 stage = 0; stage < max(STAGES - 1, 1u); ++stage) copy_next(stage);

    u32 stage = 0;
    for (u32 item = first_item; item < last_item; ++item) {
        const Task task(args, item, kv_head, member % pieces * MAX_ROWS);
        const u32 first = task.body.x, end = task.body.y;
        u32 q[D / 16][4];
        load_queries<Kv, D>(q, args, task);
        // What every row of the sequence sees.
        const u32 seen_from = max(first, window_start(task.head.w - 1, args.window));
        const u32 seen_to = min(end, task.head.w - task.head.z + 1);
        float acc[1][D / 8][4] = {};
        Softmax softmax;
        for (u32 position = first_tile(first); position < end; position += STEP) {
            // All but the newest groups are done, so this tile's is; and all lanes are done with the tile before, whose
            // stage is filled next: now, or, if it is this one's own, when this one is done.
            copy_async_wait<STAGES == 1 ? 0 : STAGES - 2>();
            __syncwarp();
            if constexpr (STAGES > 1) copy_next(stage == 0 ? STAGES - 1 : stage - 1);
            const u32 keys = stages + stage * (2 * TILE_BYTES);
            const bool all_seen = position >= seen_from && position + TILE <= seen_to;
            attend<Kv, D>(acc, softmax, q, keys, keys + TILE_BYTES, args, task, position, all_seen);
            if constexpr (STAGES == 1) {
                __syncwarp();
                copy_next(0);
            }
            stage = stage + 1 == STAGES ? 0 : stage + 1;
        }
        finish<Kv, D>(shared, args, task, acc[0], softmax, args.arrivals + task.head.x * team_size + member);
    }
}

// KV names what the cache holds in the kernels' names, NUMBER is its type.
#define DECODE(KV, NUMBER, D, NAME, ADDRESSING)                                                                        \
    extern "C" __global__ void __launch_bounds__(THREADS, D <= 128 ? 2 : 1) attention_decode_##KV##_d##D##_##NAME(     \
        u16* out, const u16* qkv, const u8* keys, const u8* values, const u32* tables, const u32* starts,              \
        const Words4* items, const u32* teams, float* partial_sums, float2* partial_stats, u32* arrivals, u32 heads,   \
        u32 kv_heads, u32 block_size, u32 window, float scale) {                                                       \
        const Arguments args = {out,          qkv,           keys,     values, tables,   starts, items,         teams, \
                                partial_sums, partial_stats, arrivals, heads,  kv_heads, window, scale * LOG2_E};      \
        decode<NUMBER, D>(args, ADDRESSING(tables, block_size));                                                       \
    }

#define DECODE_BOTH(KV, NUMBER, D)        \
    DECODE(KV, NUMBER, D, paged, Paged)   \
    DECODE(KV, NUMBER, D, contiguous, Contiguous)

#define DECODE_ALL(KV, NUMBER)    \
    DECODE_BOTH(KV, NUMBER, 64)   \
    DECODE_BOTH(KV, NUMBER, 80)   \
    DECODE_BOTH(KV, NUMBER, 96)   \
    DECODE_BOTH(KV, NUMBER, 128)  \
    DECODE_BOTH(KV, NUMBER, 256)
