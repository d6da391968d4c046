// The decode kernels over a cache of halves.
#include "attention_decode.cuh"

DECODE_ALL(f16, KvF16)
