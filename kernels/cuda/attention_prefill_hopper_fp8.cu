// The prefill kernels for Hopper over a cache of bytes (e4m3).
#define MULTIPLIED "f16"  // in the names of matrix instructions
#include "attention_prefill_hopper.cuh"

PREFILL_ALL(fp8, KvFp8)
