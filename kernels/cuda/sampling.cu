// From logits to tokens: what kernels/src/sampling.rs says, for a batch of rows of logits, [rows, vocab], float.
//
// NaN counts as minus infinity and plus infinity as the greatest float. The log-probability is that of the logits as
// given. A choice is a function of its row alone, and both kernels give the same log-probability, bit for bit: a row is
// taken in chunks of 1024 logits whose sums are combined in one order, and all masses of the drawing are integers.
//
// Launches:
//   sample_greedy(logits, tokens, logprobs or null, chunks, arrived, vocab)
//     grid (ceil(vocab / 8192), rows <= 65535), block 256, no dynamic shared memory.
//     `chunks` is scratch: rows * ceil(vocab / 1024) * 16 bytes, aligned to 16. `arrived` is `rows` words, zero before
//     the first launch and left zero by each.
//   sample(logits, batch, tokens, logprobs, work or null, vocab, per_block)
//     grid rows * CLUSTER, block 512, where CLUSTER is 8 from sm_90 on and 1 before;
//     per_block = ceil(ceil(vocab / 1024) / CLUSTER), the chunks of a block;
//     dynamic shared memory 16896 + 48 * per_block bytes, and 4096 * per_block more when `work` is null. `work` is
//     scratch for where that does not fit: rows * CLUSTER * per_block * 4096 bytes, aligned to 16.
//     `batch` is one RowRule a row and behind them the tokens seen. The logits are left as they are.
//
// The order of a draw is that of the ids, always. (The CPU draws from what top-k or top-p leaves in the order of
// probability: the same distribution, another token for one uniform number.)
#include "common.cuh"

constexpr u32 CHUNK = 1024;           // Logits that a warp holds, 32 a lane.
constexpr u32 RUN = 4 * WARP;         // Consecutive logits that a warp reads at once, 4 a lane.
constexpr u32 RUNS = CHUNK / RUN;
constexpr u32 HELD = CHUNK / WARP;
constexpr u32 GREEDY_WARPS = 8;
constexpr u32 THREADS = 512;
constexpr u32 WARPS = THREADS / WARP;
constexpr u32 BINS = 2048;            // Of a histogram over 11 bits of the logits' keys.
constexpr u32 GROUPS = BINS / WARP;
constexpr u32 FULL = 0xFFFFFFFFu;
constexpr float LOG2_E = 1.44269504f, LN_2 = 0.693147181f, FLOAT_MAX = 3.40282347e38f;

// A row falls to one cluster, whose blocks' shared memory holds it together: it is read from global memory once.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr u32 CLUSTER = 8, BLOCKS_PER_SM = 2;
#define QUIRE_CLUSTER __cluster_dims__(CLUSTER, 1, 1)
#else
constexpr u32 CLUSTER = 1, BLOCKS_PER_SM = 1;
#define QUIRE_CLUSTER
#endif

// One row's rule; kernels/src/cuda/sampling.rs packs it. `scale` is log2(e) / temperature as the sum of two floats, and
// 0 for the greedy choice; `min_p_offset` is temperature * ln(min_p). The tokens seen are words of the same buffer.
struct alignas(16) RowRule {
    double uniform;
    float scale, scale_low;
    float min_p_offset, top_p;
    u32 top_k;
    float repetition, presence, frequency;
    u32 history, history_len, prompt_len;
    u32 unused[3];
};
static_assert(sizeof(RowRule) == 64, "as packed");

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

__device__ __forceinline__ u64 warp_sum_u64(u64 x) {
    for (u32 lane = WARP / 2; lane > 0; lane /= 2) x += __shfl_xor_sync(FULL, x, lane);
    return x;
}

// Sums of the lanes up to and including each.
__device__ __forceinline__ u64 warp_scan(u64 x) {
    for (u32 distance = 1; distance < WARP; distance *= 2) {
        const u64 below = __shfl_up_sync(FULL, x, distance);
        if (lane_id() >= distance) x += below;
    }
    return x;
}

// The first lane for which `here` holds; the last if none does.
__device__ __forceinline__ u32 first_lane(bool here) {
    const u32 lanes = __ballot_sync(FULL, here);
    return lanes == 0 ? WARP - 1 : u32(__ffs(int(lanes))) - 1;
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

// The lowest id among the equal greatest. Many blocks work on a row; the last to finish combines what they found.
extern "C" __global__ void __launch_bounds__(GREEDY_WARPS* WARP)
    sample_greedy(const float* logits, u32* tokens, float* logprobs, ChunkStats* chunks, u32* arrived, u32 vocab) {
    take_turn();
    __shared__ bool last;
    const u32 row = blockIdx.y, count = (vocab + CHUNK - 1) / CHUNK, chunk = blockIdx.x * GREEDY_WARPS + warp_id();
    chunks += u64(row) * count;
    if (chunk < count) {
        float x[HELD];
        load_chunk(logits + u64(row) * vocab, chunk * CHUNK, vocab, x);
        const ChunkStats stats = chunk_stats(x, chunk * CHUNK, logprobs != nullptr);
        if (lane_id() == 0) *reinterpret_cast<uint4*>(&chunks[chunk]) = reinterpret_cast<const uint4&>(stats);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        // Releases what the block's threads wrote before the barrier, and acquires what other blocks released so.
        u32 before;
        asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;"
                     : "=r"(before)
                     : "l"(__cvta_generic_to_global(&arrived[row]))
                     : "memory");
        last = before == gridDim.x - 1;
        if (last) arrived[row] = 0;
    }
    __syncthreads();
    if (!last || warp_id() != 0) return;
    const RowStats stats = row_stats(count, [&](u32 i) {
        // Past the first-level cache, which other blocks' writes do not reach.
        const uint4 words = __ldcg(reinterpret_cast<const uint4*>(&chunks[i]));
        return ChunkStats{__uint_as_float(words.x), __uint_as_float(words.y), words.z, 0};
    });
    if (lane_id() == 0) {
        tokens[row] = stats.first;
        if (logprobs != nullptr) logprobs[row] = log_probability(stats.greatest, stats);
    }
}

// All threads of the row's blocks; what they wrote to shared memory before is visible after.
__device__ __forceinline__ void cluster_sync() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release;\n\tbarrier.cluster.wait.acquire;" ::: "memory");
#else
    __syncthreads();
#endif
}

__device__ __forceinline__ u32 cluster_rank() { return blockIdx.x % CLUSTER; }

// What block `rank` of the cluster has where this one has `mine`, which lies in shared memory.
__device__ __forceinline__ uint2 peer(const void* mine, u32 rank) {
    uint2 words;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile(
        "{\n\t.reg .u32 address;\n\t"
        "mapa.shared::cluster.u32 address, %2, %3;\n\t"
        "ld.shared::cluster.v2.u32 {%0, %1}, [address];\n\t}"
        : "=r"(words.x), "=r"(words.y)
        : "r"(shared_address(mine)), "r"(rank)
        : "memory");
#else
    words = *static_cast<const uint2*>(mine);
#endif
    return words;
}
__device__ __forceinline__ u64 peer_u64(const u64* mine, u32 rank) {
    const uint2 words = peer(mine, rank);
    return u64(words.y) << 32 | words.x;
}

// What one warp found for its block.
struct Found {
    u64 target, before, at;
    u32 bin, chunk, id;
};

// A block's part of a row, and its scratch, all in shared memory but perhaps `values`.
struct Block {
    float* values;
    u64* bins;
    u64* groups;
    ChunkStats* given;
    ChunkStats* penalized;
    u64* sums;
    Found* found;
    u32 first, chunks, row_chunks, per_block;
};

struct Weighting {
    float greatest, scale, scale_low;
};

// e^((x - greatest) / temperature) in units of 2^-44, of which the whole vocabulary's sum fits. The product's rounding
// error is made good, for a small weight's exponent is a large number.
__device__ __forceinline__ u64 weight_of(float x, const Weighting& weighting) {
    const float difference = x - weighting.greatest;
    const float exponent = __fmul_rn(difference, weighting.scale);
    if (!(exponent > -46.0f)) return 0;
    const float rest = fmaf(difference, weighting.scale_low, fmaf(difference, weighting.scale, -exponent));
    const float weight = exp2_fast(exponent);
    return __float2ull_rn(fmaf(weight, rest * LN_2, weight) * 17592186044416.0f);
}

template <typename F>
__device__ __forceinline__ void for_chunk(const Block& block, u32 chunk, F f) {
    const u32 first_id = (block.first + chunk) * CHUNK;
#pragma unroll 1
    for (u32 run = 0; run < RUNS; ++run) {
        const u32 at = run * RUN + lane_id() * 4;
        const float4 four = *reinterpret_cast<const float4*>(block.values + chunk * CHUNK + at);
        f(four.x, first_id + at);
        f(four.y, first_id + at + 1);
        f(four.z, first_id + at + 2);
        f(four.w, first_id + at + 3);
    }
}

// Adds to a 64-bit sum by 32-bit atomics, which shared memory has: whoever makes the lower half wrap carries.
__device__ __forceinline__ void add_to(u64* sum, u64 value) {
    u32* halves = reinterpret_cast<u32*>(sum);
    const u32 low = u32(value);
    u32 high = u32(value >> 32);
    if (low != 0 && atomicAdd(&halves[0], low) + low < low) ++high;
    if (high != 0) atomicAdd(&halves[1], high);
}
// Counts stay below 2^32.
__device__ __forceinline__ void add_to(u64* sum, u32 count) { atomicAdd(reinterpret_cast<u32*>(sum), count); }

// The key at which the sum of `value(logit, key)` over the logits of keys from it up reaches a target, the part of the
// target that falls to this key, and the sum over the logits of this key. Three digits of the key, by histogram.
// `value` must be zero below `floor`; `target_of` gives the target, at least 1 and at most the total it is given.
struct Threshold {
    u32 key;
    u64 left, at;
};
template <typename Value, typename Target>
__device__ __forceinline__ Threshold select(const Block& block, u32 floor, Value value, Target target_of) {
    u32 prefix = 0;
    u64 target = 0, at = 0;
#pragma unroll 1
    for (u32 level = 0; level < 3; ++level) {
        const u32 bits = level < 2 ? 11 : 10, shift = level == 0 ? 21 : level == 1 ? 10 : 0;
        cluster_sync();  // No block reads the last histograms any more.
        for (u32 i = threadIdx.x; i < BINS; i += THREADS) block.bins[i] = 0;
        __syncthreads();
        for (u32 chunk = warp_id(); chunk < block.chunks; chunk += WARPS) {
            for_chunk(block, chunk, [&](float x, u32) {
                const u32 key = ordered(x);
                if (key < floor || u64(key) >> (shift + bits) != prefix) return;
                add_to(&block.bins[key >> shift & ((1u << bits) - 1)], value(x));
            });
        }
        __syncthreads();
        for (u32 group = warp_id(); group < GROUPS; group += WARPS) {
            const u64 sum = warp_sum_u64(block.bins[group * WARP + lane_id()]);
            if (lane_id() == 0) block.groups[group] = sum;
        }
        cluster_sync();
        if (warp_id() == 0) {
            // From the greatest down: two groups a lane, then a bin of the group a lane.
            const u32 group = GROUPS - 1 - 2 * lane_id();
            u64 upper = 0, lower = 0;
#pragma unroll
            for (u32 rank = 0; rank < CLUSTER; ++rank) {
                upper += peer_u64(&block.groups[group], rank);
                lower += peer_u64(&block.groups[group - 1], rank);
            }
            const u64 groups = warp_scan(upper + lower);
            if (level == 0) target = target_of(__shfl_sync(FULL, groups, WARP - 1));
            const u32 lane = first_lane(groups >= target);
            const u64 above = groups - upper - lower;
            const bool second = above + upper < target;
            const u64 before_group = __shfl_sync(FULL, second ? above + upper : above, lane);
            const u32 bin = __shfl_sync(FULL, second ? group - 1 : group, lane) * WARP + WARP - 1 - lane_id();
            u64 mine = 0;
#pragma unroll
            for (u32 rank = 0; rank < CLUSTER; ++rank) mine += peer_u64(&block.bins[bin], rank);
            const u64 upto = before_group + warp_scan(mine);
            if (lane_id() == first_lane(upto >= target)) *block.found = {target, upto - mine, mine, bin, 0, 0};
        }
        __syncthreads();
        target = block.found->target - block.found->before;
        at = block.found->at;
        prefix = prefix << bits | block.found->bin;
    }
    return {prefix, target, at};
}

// Among values in the order of ids: where the sum first exceeds an index that `index_of` gives, below the total it is
// given. All blocks learn the chunk; the block that has it, the id too, and the others FULL.
template <typename Value, typename Index>
__device__ __forceinline__ void find(const Block& block, Value value, Index index_of) {
    cluster_sync();  // No block reads the last sums any more.
    for (u32 chunk = warp_id(); chunk < block.chunks; chunk += WARPS) {
        u64 sum = 0;
        for_chunk(block, chunk, [&](float x, u32 id) { sum += value(x, id); });
        sum = warp_sum_u64(sum);
        if (lane_id() == 0) block.sums[chunk] = sum;
    }
    cluster_sync();
    if (warp_id() == 0) {
        const auto sum_of = [&](u32 i) { return peer_u64(&block.sums[i % block.per_block], i / block.per_block); };
        const u32 each = (block.row_chunks + WARP - 1) / WARP;
        const u32 end = min((lane_id() + 1) * each, block.row_chunks);
        u32 chunk = min(lane_id() * each, block.row_chunks), id = FULL;
        u64 mine = 0;
        for (u32 i = chunk; i < end; ++i) mine += sum_of(i);
        const u64 upto = warp_scan(mine);
        const u64 index = index_of(__shfl_sync(FULL, upto, WARP - 1));
        const u32 lane = first_lane(upto > index);
        u64 left = index - (upto - mine);
        if (lane_id() == lane) {
            for (; chunk + 1 < end; ++chunk) {
                const u64 sum = sum_of(chunk);
                if (left < sum) break;
                left -= sum;
            }
        }
        chunk = __shfl_sync(FULL, chunk, lane);
        left = __shfl_sync(FULL, left, lane);
        if (chunk - block.first < block.chunks) {
            const float* values = block.values + (chunk - block.first) * CHUNK;
#pragma unroll 1
            for (u32 at = lane_id() * 4; at < CHUNK && id == FULL; at += RUN) {
                u64 v[4], run = 0;
#pragma unroll
                for (u32 i = 0; i < 4; ++i) run += v[i] = value(values[at + i], chunk * CHUNK + at + i);
                const u64 runs = warp_scan(run), total = __shfl_sync(FULL, runs, WARP - 1);
                const u32 hit = first_lane(runs > left);
                if (left < total) {
                    u64 rest = left - (runs - run);
                    u32 skipped = 0;
#pragma unroll
                    for (u32 i = 0; i < 3; ++i) {
                        if (skipped == i && rest >= v[i]) rest -= v[i], ++skipped;
                    }
                    id = __shfl_sync(FULL, chunk * CHUNK + at + skipped, hit);
                }
                left -= total;
            }
        }
        if (lane_id() == 0) block.found->chunk = chunk, block.found->id = id;
    }
    __syncthreads();
}

// Applies the penalties. The histogram's memory counts a stretch of ids at a time: whether a token was seen in the
// prompt, and how often in the output. Each product and sum is rounded by itself, as the CPU does.
__device__ __forceinline__ void penalize(const Block& block, const RowRule& rule, const u32* __restrict__ history,
                                         u32 vocab) {
    constexpr u32 COUNTERS = 2 * BINS, PROMPT = 1u << 31;
    u32* counters = reinterpret_cast<u32*>(block.bins);
    const u32 begin = block.first * CHUNK, end = min(vocab, begin + block.chunks * CHUNK);
    for (u32 base = begin; base < end; base += COUNTERS) {
        const u32 room = min(COUNTERS, end - base);
        for (u32 i = threadIdx.x; i < room; i += THREADS) counters[i] = 0;
        __syncthreads();
        for (u32 i = threadIdx.x; i < rule.history_len; i += THREADS) {
            const u32 at = history[i] - base;
            if (at >= room) continue;
            if (i < rule.prompt_len) {
                atomicOr(&counters[at], PROMPT);
            } else {
                atomicAdd(&counters[at], 1);
            }
        }
        __syncthreads();
        for (u32 i = threadIdx.x; i < room; i += THREADS) {
            if (counters[i] == 0) continue;
            const u32 count = counters[i] & ~PROMPT;
            float& x = block.values[base - begin + i];
            x = x > 0.0f ? __fdiv_rn(x, rule.repetition) : __fmul_rn(x, rule.repetition);
            if (count > 0) x = __fsub_rn(x, __fadd_rn(__fmul_rn(rule.frequency, float(count)), rule.presence));
            x = clean(x);
        }
        __syncthreads();
    }
}

// Draws a token, which one block of the cluster learns; the others get FULL.
__device__ __forceinline__ u32 draw(const Block& block, const RowRule& rule, float greatest, u32 vocab) {
    const Weighting weighting = {greatest, rule.scale, rule.scale_low};
    const auto weight = [&](float x) { return weight_of(x, weighting); };
    // Logits of keys from `floor` up stay, but of its own key only the first `keep` of `ties`. The most probable token
    // stays under every min-p.
    u32 floor = ordered(fminf(greatest + rule.min_p_offset, greatest) + 0.0f);
    u64 keep = 0, ties = 0;
    if (rule.top_k > 0 && rule.top_k < vocab) {
        const Threshold least = select(
            block, floor, [](float) { return 1u; }, [&](u64 total) { return min(u64(rule.top_k), total); });
        floor = least.key, keep = least.left, ties = least.at;
    }
    if (rule.top_p < 1.0f) {
        const u64 excess = (ties - keep) * weight(unordered(floor));
        const Threshold least = select(block, floor, weight, [&](u64 total) {
            const double wanted = ceil(double(rule.top_p) * double(total - excess));
            return wanted > 1.0 ? min(u64(wanted), total - excess) : 1;
        });
        const u64 each = max(weight(unordered(least.key)), 1ull);
        floor = least.key, keep = (least.left + each - 1) / each, ties = least.at / each;
    }
    u32 bound = FULL;
    if (keep < ties) {
        find(block, [&](float x, u32) { return u64(ordered(x) == floor); }, [&](u64) { return keep - 1; });
        // Another block's ids are all on one side of the chunk.
        bound = block.found->id == FULL ? block.found->chunk * CHUNK : block.found->id + 1;
    }
    const auto kept = [&](float x, u32 id) {
        const u32 key = ordered(x);
        return key > floor || (key == floor && id < bound) ? weight(x) : 0;
    };
    find(block, kept, [&](u64 total) { return min(u64(rule.uniform * double(total)), total - 1); });
    return block.found->id;
}

extern "C" __global__ void QUIRE_CLUSTER __launch_bounds__(THREADS, BLOCKS_PER_SM)
    sample(const float* __restrict__ logits, const RowRule* __restrict__ batch, u32* __restrict__ tokens,
           float* __restrict__ logprobs, float* work, u32 vocab, u32 per_block) {
    extern __shared__ Words4 dynamic[];
    __shared__ Found found;
    __shared__ RowStats stats[2];
    const u32 row = blockIdx.x / CLUSTER, rank = cluster_rank(), row_chunks = (vocab + CHUNK - 1) / CHUNK;
    logits += u64(row) * vocab;
    const RowRule rule = batch[row];
    Block block;
    block.bins = reinterpret_cast<u64*>(dynamic);
    block.groups = block.bins + BINS;
    block.given = reinterpret_cast<ChunkStats*>(block.groups + GROUPS);
    block.penalized = block.given + per_block;
    block.sums = reinterpret_cast<u64*>(block.penalized + per_block);
    block.values = work == nullptr ? reinterpret_cast<float*>(block.sums + 2 * per_block)
                                   : work + u64(blockIdx.x) * per_block * CHUNK;
    block.found = &found;
    block.first = rank * per_block;
    block.chunks = block.first < row_chunks ? min(per_block, row_chunks - block.first) : 0;
    block.row_chunks = row_chunks;
    block.per_block = per_block;

    for (u32 chunk = warp_id(); chunk < block.chunks; chunk += WARPS) {
        float x[HELD];
        const u32 first_id = (block.first + chunk) * CHUNK;
        load_chunk(logits, first_id, vocab, x);
        const ChunkStats known = chunk_stats(x, first_id, true);
        if (lane_id() == 0) block.given[chunk] = known, block.penalized[chunk] = known;
#pragma unroll
        for (u32 i = 0; i < HELD; i += 4) {
            *reinterpret_cast<float4*>(block.values + chunk * CHUNK + id_of(0, i)) =
                make_float4(x[i], x[i + 1], x[i + 2], x[i + 3]);
        }
    }
    __syncthreads();
    if (rule.history_len > 0) {
        penalize(block, rule, reinterpret_cast<const u32*>(batch) + rule.history, vocab);
        for (u32 chunk = warp_id(); chunk < block.chunks; chunk += WARPS) {
            float x[HELD];
#pragma unroll
            for (u32 i = 0; i < HELD; ++i) x[i] = block.values[chunk * CHUNK + id_of(0, i)];
            const ChunkStats known = chunk_stats(x, (block.first + chunk) * CHUNK, false);
            if (lane_id() == 0) block.penalized[chunk] = known;
        }
    }
    cluster_sync();
    if (warp_id() < 2) {
        const ChunkStats* chunks = warp_id() == 0 ? block.given : block.penalized;
        const RowStats known = row_stats(row_chunks, [&](u32 i) {
            const ChunkStats* chunk = &chunks[i % per_block];
            const uint2 numbers = peer(&chunk->greatest, i / per_block), first = peer(&chunk->first, i / per_block);
            return ChunkStats{__uint_as_float(numbers.x), __uint_as_float(numbers.y), first.x, 0};
        });
        if (lane_id() == 0) stats[warp_id()] = known;
    }
    __syncthreads();
    const RowStats given = stats[0], penalized = stats[1];
    u32 token = FULL;
    if (given.greatest == NEG_INFINITY) {
        token = rank == 0 ? 0 : FULL;
    } else if (rule.scale > 0.0f && penalized.greatest > NEG_INFINITY) {
        token = draw(block, rule, penalized.greatest, vocab);
    } else {
        token = rank == 0 ? penalized.first : FULL;
    }
    if (token != FULL && threadIdx.x == 0) {
        tokens[row] = token;
        logprobs[row] = log_probability(clean(logits[token]), given);
    }
    cluster_sync();  // A block's shared memory stays until the others have read it.
}
