// The warpgroups of attention_prefill_hopper.cuh that compute: scores, weights, sums of values, and the rows they give.
#pragma once
#include "attention_prefill_hopper_wgmma.cuh"
#include "barriers.cuh"

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

// Waits for the queries of the item of a round, and reads what it is. `row` is the warp's first.
template <class S>
__device__ __forceinline__ Sight next_item(const Arguments& args, u32 base, u32 round, u32 row) {
    const Place<S::QUERIES> queries(round);
    barrier_wait(base + S::QUERIES_FULL + queries.index * 8, queries.parity);
    const Words4 head = load_shared(S::work(base, round)), body = load_shared(S::work(base, round) + 16);
    const u32 group = args.heads / args.kv_heads;
    const Rows rows = {head.z * group, body.x, head.w - head.z, group};
    const u32 lane = threadIdx.x % WARP;
    Sight sight;
    sight.position = body.y / S::TILE * S::TILE;
    sight.end = body.z;
    sight.clear_from = window_start(rows.position(row + 15), args.window);
    sight.clear_to = rows.position(row) + 1;
    sight.high[0] = rows.position(row + lane / 4) + 1;
    sight.high[1] = rows.position(row + lane / 4 + 8) + 1;
    return sight;
}

// Issues scores = queries * keys^T.
template <class S>
__device__ __forceinline__ void score(float (&scores)[S::TILE / 8][4], u32 queries, u32 keys) {
    // Else the descriptors below would all be kept, where queries are at one place for all items.
    asm volatile("" : "+r"(queries));
    const u64 a = matrix_at<ROWS>(queries), b = matrix_at<S::TILE>(keys);
    multiply_rows<false>(scores, a, b);
#pragma unroll
    for (u32 k = 1; k < S::D / 16; ++k) {
        const u32 within = k % 4 * 32;
        multiply_rows<true>(scores, a + (k / 4 * SPAN<ROWS> + within) / 16, b + (k / 4 * SPAN<S::TILE> + within) / 16);
    }
    matrix_commit();
}

// Issues acc += weights * values.
template <u32 OUT_TILES, u32 STEPS>
__device__ __forceinline__ void add_values(float (&acc)[OUT_TILES][4], const u32 (&weights)[STEPS][4], u32 values) {
    const u64 b = matrix_at<STEPS * 16>(values);
#pragma unroll
    for (u32 k = 0; k < STEPS; ++k) multiply_columns(acc, weights[k], b + k * (16 * 128 / 16));
    matrix_commit();
}

// Scores become weights relative to the rows' greatest so far; `rescale` is what sums were multiplied by therefore.
template <u32 SCORE_TILES>
__device__ __forceinline__ void make_weights(float (&scores)[SCORE_TILES][4], Softmax& softmax, float (&rescale)[2],
                                             float scale_log2) {
    float base[2];
#pragma unroll
    for (u32 half = 0; half < 2; ++half) {
        float greatest[2] = {scores[0][2 * half], scores[0][2 * half + 1]};
#pragma unroll
        for (u32 j = 1; j < SCORE_TILES; ++j) {
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
    for (u32 j = 0; j < SCORE_TILES; ++j) {
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
            scores[j][i] = exp2_approx(fmaf(scores[j][i], scale_log2, -base[i / 2]));
            softmax.sum[i / 2] += scores[j][i];
        }
    }
}

template <class Number, u32 STEPS>
__device__ __forceinline__ void round_weights(u32 (&weights)[STEPS][4], const float (&scores)[2 * STEPS][4]) {
#pragma unroll
    for (u32 k = 0; k < STEPS; ++k) {
        weights[k][0] = Number::pack(scores[2 * k][0], scores[2 * k][1]);
        weights[k][1] = Number::pack(scores[2 * k][2], scores[2 * k][3]);
        weights[k][2] = Number::pack(scores[2 * k + 1][0], scores[2 * k + 1][1]);
        weights[k][3] = Number::pack(scores[2 * k + 1][2], scores[2 * k + 1][3]);
    }
}

template <u32 OUT_TILES>
__device__ __forceinline__ void multiply_all(float (&acc)[OUT_TILES][4], const float (&by)[2]) {
#pragma unroll
    for (u32 j = 0; j < OUT_TILES; ++j)
#pragma unroll
        for (u32 i = 0; i < 4; ++i) acc[j][i] *= by[i / 2];
}

__device__ __forceinline__ void store_shared(u32 address, u32 word) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(word) : "memory");
}

// Divides by the sums of weights and writes the warp's rows of the item of a round.
//
// By way of the shared memory that held their queries, so that whole rows are written, and then that is free; where it
// holds the next item's by now, each lane writes what it has.
template <class S>
__device__ __forceinline__ void store_rows(const Arguments& args, u32 base, u32 round, u32 warpgroup, u32 row,
                                           float (&acc)[S::D / 8][4], const float (&sums)[2]) {
    constexpr u32 PIECES = S::D / 8, LANES = LANES_OF_ROW<S::D>, AT_ONCE = WARP / LANES;
    const u32 lane = threadIdx.x % WARP;
    const Words4 head = load_shared(S::work(base, round)), body = load_shared(S::work(base, round) + 16);
    const float factors[2] = {__fdividef(1.0f, quad_sum(sums[0])), __fdividef(1.0f, quad_sum(sums[1]))};
    // Lane i finds out where row i of the warp goes.
    const u32 group = args.heads / args.kv_heads;
    const u32 mine = body.x + row + lane % 16, query = mine / group;
    u32 number = (head.y + query) * args.heads + body.w * group + (mine - query * group);
    if (mine >= head.z * group) number = NO_SLOT;
    if constexpr (S::QUERIES == 1) {
#pragma unroll
        for (u32 half = 0; half < 2; ++half) {
            const u32 to = __shfl_sync(ALL_LANES, number, int(lane / 4 + 8 * half));
            u16* const out = args.out + u64(to) * S::D + lane % 4 * 2;
            // Asked at every store: after a branch, ptxas no longer sees that this warpgroup has registers of its own.
#pragma unroll
            for (u32 j = 0; j < PIECES; ++j) {
                const u32 packed = pack(acc[j][2 * half] * factors[half], acc[j][2 * half + 1] * factors[half]);
                if (to != NO_SLOT) *reinterpret_cast<u32*>(out + 8 * j) = packed;
            }
        }
    } else {
        const u32 buffer = round % S::QUERIES, tile = base + buffer * S::QUERY_BYTES + row * 128;
        multiply_all(acc, factors);
        // The warpgroup has read its queries for the last time.
        threads_sync<WARPGROUP>(3 + warpgroup);
#pragma unroll
        for (u32 j = 0; j < PIECES; ++j) {
            const u32 to = tile + j / 8 * SPAN<ROWS> + lane / 4 * 128 + (j % 8 ^ lane / 4) * 16 + lane % 4 * 4;
            store_shared(to, pack(acc[j][0], acc[j][1]));
            store_shared(to + 8 * 128, pack(acc[j][2], acc[j][3]));
        }
        __syncwarp();
        const u32 lane_row = lane / LANES, piece = lane % LANES;
        const u32 from = tile + piece / 8 * SPAN<ROWS> + lane_row * 128 + (piece % 8 ^ lane_row) * 16;
#pragma unroll
        for (u32 first = 0; first < 16; first += AT_ONCE) {
            const u32 to = __shfl_sync(ALL_LANES, number, int(first + lane_row));
            if (to == NO_SLOT || piece >= PIECES) continue;
            const Words4 words = load_shared((from ^ first % 8 * 16) + first * 128);
            *reinterpret_cast<Words4*>(args.out + u64(to) * S::D + piece * 8) = words;
        }
        barrier_arrive(base + S::QUERIES_FREE + buffer * 8);
    }
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

    float scores[S::TILE / 8][4];
    float acc[S::D / 8][4] = {};
    u32 weights[S::TILE / 16][4];
    Softmax softmax;
    float rescale[2];
    const auto weigh = [&](const Sight& sight) {
        if (sight.position < sight.clear_from || sight.position + S::TILE > sight.clear_to) {
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
    // The scores of a tile are there.
    const auto release_keys = [&](u32 index, const Sight& sight) {
        if (leads) barrier_arrive(base + S::KEYS_FREE + index * 8);
        if (S::QUERIES == 1 && sight.position + S::TILE >= sight.end) barrier_arrive(base + S::QUERIES_FREE);
    };

    Sight sight = next_item<S>(args, base, 0, row);
    barrier_wait(base + S::KEYS_FULL, 0);
    hold(scores);
    matrix_fence();
    score<S>(scores, queries, base + S::KEYS);
    matrix_wait<0>();
    hold(scores);
    release_keys(0, sight);
    weigh(sight);
    round_weights<typename S::Kv>(weights, scores);

    u32 tiles = 0;  // computed completely
    for (;; ++tiles) {
        // The scores of the next tile, and the values of this one.
        sight.position += S::TILE;
        // A vote tells the compiler that the warp goes one way.
        const bool ends = __any_sync(ALL_LANES, sight.position >= sight.end);
        if (ends) {
            if (piece_of(round + 1) >= args.pieces) break;
            ++round;
            sight = next_item<S>(args, base, round, row);
        }
        const Place<S::STAGES> key_place(tiles + 1), value_place(tiles);
        barrier_wait(base + S::KEYS_FULL + key_place.index * 8, key_place.parity);
        threads_sync<2 * WARPGROUP>(1 + warpgroup);
        hold(scores);
        hold(acc);
        hold(weights);
        matrix_fence();
        score<S>(scores, queries + round % S::QUERIES * S::QUERY_BYTES, base + S::KEYS + key_place.index * S::BYTES);
        barrier_wait(base + S::VALUES_FULL + value_place.index * 8, value_place.parity);
        matrix_fence();  // ptxas would put one after the loop above by itself, but only where it waits for all before
        add_values(acc, weights, base + S::VALUES + value_place.index * S::BYTES);
        threads_arrive<2 * WARPGROUP>(2 - warpgroup);

        matrix_wait<1>();
        hold(scores);
        release_keys(key_place.index, sight);
        const float sums[2] = {softmax.sum[0], softmax.sum[1]};
        if (ends) softmax = Softmax();
        weigh(sight);
        finish_before_wait(softmax.sum[0] + softmax.sum[1]);
        matrix_wait<0>();
        hold(acc);
        hold(weights);
        if (leads) barrier_arrive(base + S::VALUES_FREE + value_place.index * 8);
        round_weights<typename S::Kv>(weights, scores);
        if (ends) {
            store_rows<S>(args, base, round - 1, warpgroup, row, acc, sums);
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
    store_rows<S>(args, base, round, warpgroup, row, acc, sums);
}
