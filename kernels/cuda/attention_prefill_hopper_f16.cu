// The prefill kernels for Hopper over a cache of halves.
#define MULTIPLIED "f16"  // in the names of matrix instructions
#include "attention_prefill_hopper.cuh"

PREFILL_ALL(f16, KvF16)
