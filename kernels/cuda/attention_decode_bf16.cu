// The decode kernels over a cache of bfloat16.
#include "attention_decode.cuh"

DECODE_ALL(bf16, KvBf16)
