// What becomes of the sums of skinny.cu. PARTS weight rows make one output; weight_row(output, part) names them.
#pragma once
#include "common.cuh"

template <class Element>
struct Store {
    static constexpr u32 PARTS = 1;
    Element* out;
    const u16* bias;
    u32 n;

    __device__ __forceinline__ u32 outputs() const { return n; }
    __device__ __forceinline__ u32 weight_row(u32 output, u32) const { return output; }
    __device__ __forceinline__ void operator()(u32 row, u32 output, const float (&sum)[PARTS]) const {
        const float value = bias == nullptr ? sum[0] : sum[0] + element_to_float(bias[output]);
        put(out + u64(row) * n + output, value);
    }
    static __device__ __forceinline__ void put(u16* to, float value) { *to = float_to_element(value); }
    static __device__ __forceinline__ void put(float* to, float value) { *to = value; }
};

struct Gated {
    static constexpr u32 PARTS = 2;
    u16* out;
    u32 n;

    __device__ __forceinline__ u32 outputs() const { return n; }
    __device__ __forceinline__ u32 weight_row(u32 output, u32 part) const { return output + part * n; }
    __device__ __forceinline__ void operator()(u32 row, u32 output, const float (&sum)[PARTS]) const {
        out[u64(row) * n + output] = float_to_element(silu(sum[0]) * sum[1]);
    }
};

struct Rotated {
    static constexpr u32 PARTS = 2;
    u16* out;
    const u16* bias;
    const float2* table;
    const u32* positions;
    const u32* slots;
    u16* keys;
    u16* values;
    u32 heads, kv_heads, half;
    u32 reciprocal = 0xFFFFFFFFu / half + 1;

    __device__ __forceinline__ u32 outputs() const { return (heads + 2 * kv_heads) * half; }
    // output / half: exact as long as output * half is below 2^32.
    __device__ __forceinline__ u32 head_of(u32 output) const { return __umulhi(output, reciprocal); }
    __device__ __forceinline__ u32 weight_row(u32 output, u32 part) const {
        return output + (head_of(output) + part) * half;
    }
    __device__ __forceinline__ void operator()(u32 row, u32 output, const float (&sum)[PARTS]) const {
        const u32 slot = slots[row];
        if (slot == NO_SLOT) return;
        const u32 head = head_of(output), i = output - head * half;
        float low = sum[0], high = sum[1];
        if (bias != nullptr) {
            low += element_to_float(bias[weight_row(output, 0)]);
            high += element_to_float(bias[weight_row(output, 1)]);
        }
        if (head < heads + kv_heads) {
            const float2 angle = table[u64(positions[row]) * half + i];
            const float turned = low * angle.x - high * angle.y;
            high = high * angle.x + low * angle.y;
            low = turned;
        }
        u16* to = out + (u64(row) * (heads + 2 * kv_heads) + head) * (2 * half);
        if (head >= heads) {
            const u32 kv_head = head - heads;
            to = kv_head < kv_heads ? keys + (u64(slot) * kv_heads + kv_head) * (2 * half)
                                    : values + (u64(slot) * kv_heads + kv_head - kv_heads) * (2 * half);
        }
        to[i] = float_to_element(low);
        to[i + half] = float_to_element(high);
    }
};
