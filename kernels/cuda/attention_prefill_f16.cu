// The prefill kernels over a cache of halves.
#include "attention_prefill.cuh"

PREFILL_SMALL(f16, KvF16)
PREFILL_LARGE(f16, KvF16)
PREFILL_BOTH(f16, KvF16, 128, 128)
