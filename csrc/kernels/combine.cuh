// y[t] = sum over slots s, in order, of topk_weights[t, s] * slot row (docs/numerics.md, R6).
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

namespace jax_w4moe {

inline constexpr int kCombineThreads = 256;

// One block per token; hidden_size is a multiple of 32. A slot without a row adds nothing,
// whatever its weight.
__global__ void __launch_bounds__(kCombineThreads)
    CombineSlots(const __nv_bfloat16* __restrict__ slots, const int* __restrict__ row_of_pair,
                 const float* __restrict__ topk_weights, int top_k, int hidden_size,
                 __nv_bfloat16* __restrict__ y) {
  const int64_t token = blockIdx.x;
  for (int h = threadIdx.x * 4; h < hidden_size; h += kCombineThreads * 4) {
    float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    for (int s = 0; s < top_k; ++s) {
      const int row = row_of_pair[token * top_k + s];
      if (row < 0) continue;
      const float weight = topk_weights[token * top_k + s];
      const uint2 four = *reinterpret_cast<const uint2*>(slots + int64_t{row} * hidden_size + h);
      sum[0] = fmaf(weight, __uint_as_float(four.x << 16), sum[0]);
      sum[1] = fmaf(weight, __uint_as_float(four.x & 0xffff0000u), sum[1]);
      sum[2] = fmaf(weight, __uint_as_float(four.y << 16), sum[2]);
      sum[3] = fmaf(weight, __uint_as_float(four.y & 0xffff0000u), sum[3]);
    }
    __nv_bfloat162* out = reinterpret_cast<__nv_bfloat162*>(y + token * hidden_size + h);
    out[0] = __floats2bfloat162_rn(sum[0], sum[1]);
    out[1] = __floats2bfloat162_rn(sum[2], sum[3]);
  }
}

}  // namespace jax_w4moe
