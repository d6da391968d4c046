// The prefill kernels over a cache of bytes (e4m3).
#include "attention_prefill.cuh"

PREFILL_SMALL(fp8, KvFp8)
PREFILL_LARGE(fp8, KvFp8)
// Not 128 rows of heads of 128: there are too few registers.
