// The prefill kernels for Hopper over a cache of bfloat16.
#define MULTIPLIED "bf16"  // in the names of matrix instructions
#include "attention_prefill_hopper.cuh"

PREFILL_ALL(bf16, KvBf16)
