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
//   sample(logits, batch, previous, tokens, logprobs, work or null, vocab, per_block)
//     grid rows * CLUSTER, block 512, where CLUSTER is 8 from sm_90 on and 1 before;
//     per_block = ceil(ceil(vocab / 1024) / CLUSTER), the chunks of a block;
//     dynamic shared memory 16896 + 48 * per_block bytes, and 4096 * per_block more when `work` is null. `work` is
//     scratch for where that does not fit: rows * CLUSTER * per_block * 4096 bytes, aligned to 16.
//     `batch` is one RowRule a row and behind them the tokens seen. The logits are left as they are. A token seen from FED on
//     is the one at `previous[token - FED]`.
//   sample_top(logits, wanted, found, vocab): sampling_top.cuh
//     grid one block a row of which most probable tokens are wanted, block 512, no dynamic shared memory.
//
// The order of a draw is that of the ids, always. (The CPU draws from what top-k or top-p leaves in the order of
// probability: the same distribution, another token for one uniform number.)
#include "sampling_search.cuh"
#include "sampling_top.cuh"

constexpr u32 GREEDY_WARPS = 8;
constexpr float LN_2 = 0.693147181f;
constexpr u32 FED = 1u << 31;         // Ids from here on name a row of the batch before: the host does not know its token yet.

// One row's rule; kernels/src/cuda/sampling/rules.rs packs it. `scale` is log2(e) / temperature as the sum of two floats,
// and 0 for the greedy choice; `min_p_offset` is temperature * ln(min_p). The tokens seen are words of the same buffer.
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

// Applies the penalties. The histogram's memory counts a stretch of ids at a time: whether a token was seen in the
// prompt, and how often in the output. Each product and sum is rounded by itself, as the CPU does.
__device__ __forceinline__ void penalize(const Block& block, const RowRule& rule, const u32* __restrict__ history,
                                         const u32* __restrict__ previous, u32 vocab) {
    constexpr u32 COUNTERS = 2 * BINS, PROMPT = 1u << 31;
    u32* counters = reinterpret_cast<u32*>(block.bins);
    const u32 begin = block.first * CHUNK, end = min(vocab, begin + block.chunks * CHUNK);
    for (u32 base = begin; base < end; base += COUNTERS) {
        const u32 room = min(COUNTERS, end - base);
        for (u32 i = threadIdx.x; i < room; i += THREADS) counters[i] = 0;
        __syncthreads();
        for (u32 i = threadIdx.x; i < rule.history_len; i += THREADS) {
            const u32 token = history[i], at = (token >= FED ? previous[token - FED] : token) - base;
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
    sample(const float* __restrict__ logits, const RowRule* __restrict__ batch, const u32* __restrict__ previous,
           u32* __restrict__ tokens, float* __restrict__ logprobs, float* work, u32 vocab, u32 per_block) {
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
        penalize(block, rule, reinterpret_cast<const u32*>(batch) + rule.history, previous, vocab);
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
