// The decode kernels over a cache of bytes (e4m3).
#include "attention_decode.cuh"

DECODE_ALL(fp8, KvFp8)
