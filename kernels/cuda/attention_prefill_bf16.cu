// The prefill kernels over a cache of bfloat16.
#include "attention_prefill.cuh"

PREFILL_SMALL(bf16, KvBf16)
PREFILL_LARGE(bf16, KvBf16)
PREFILL_BOTH(bf16, KvBf16, 128, 128)
