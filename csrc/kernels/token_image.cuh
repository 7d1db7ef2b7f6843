// Writes E4M3 rows as the shared-memory image that WGMMA reads: atoms of 8 tokens x 128 bytes with
// the 128-byte swizzle, [K/128][atoms][1024 B], K permuted as in the weights (docs/layout.md).
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "kernels/quantize_row.cuh"
#include "schedule/grouped.cuh"

namespace jax_w4moe {

inline constexpr int kImageThreads = 128;

// The row of lhs-in-expert-order that an image's padded row shows, or -1 for padding.
__device__ __forceinline__ int64_t RowOfPadded(int padded, int num_experts, const Plan& plan) {
  const int atom = padded / kTokenAtom;
  if (atom >= plan.atom_start[num_experts]) return -1;
  const int expert = LastNotAbove(plan.atom_start, num_experts, atom);
  const int in_expert = padded - plan.atom_start[expert] * kTokenAtom;
  return in_expert < plan.size[expert] ? plan.row_start[expert] + in_expert : -1;
}

// Where 16 bytes of a padded row lie: chunk 8 b + part holds instruction part / 2, half part % 2 of
// K-block b, that is k = 128 b + 32 t + 4 part + byte for t = 0..3.
__device__ __forceinline__ uint4* ImageChunk(uint8_t* image, int padded, int chunk, int num_atoms) {
  const int token = padded % kTokenAtom;
  const int64_t atom = int64_t{chunk / 8} * num_atoms + padded / kTokenAtom;
  return reinterpret_cast<uint4*>(image + atom * 1024 + token * 128 + ((chunk % 8) ^ token) * 16);
}

// One block per padded row. Rows that pad an expert to whole atoms, and those beyond the last
// expert, are zeros. `width` (of lhs) is a multiple of 32. With `pairs`, row r shows row
// pairs[r] / top_k of lhs, and its scale is copied to row_scale[r].
__global__ void __launch_bounds__(kImageThreads)
    WriteTokenImage(const uint8_t* __restrict__ lhs, uint8_t* __restrict__ image, int num_experts,
                    int width, int num_atoms, Plan plan, const int* __restrict__ pairs, int top_k,
                    const float* __restrict__ x_scale, float* __restrict__ row_scale) {
  int64_t row = RowOfPadded(blockIdx.x, num_experts, plan);
  if (pairs && row >= 0) {
    const int token = pairs[row] / top_k;
    if (threadIdx.x == 0) row_scale[row] = x_scale[token];
    row = token;
  }
  const int chunks = (width + 127) / 128 * 8;
  for (int chunk = threadIdx.x; chunk < chunks; chunk += kImageThreads) {
    uint32_t words[4] = {0, 0, 0, 0};
    if (row >= 0) {
#pragma unroll
      for (int t = 0; t < 4; ++t) {
        const int k = chunk / 8 * 128 + 32 * t + 4 * (chunk % 8);
        if (k < width) words[t] = *reinterpret_cast<const uint32_t*>(lhs + row * width + k);
      }
    }
    *ImageChunk(image, blockIdx.x, chunk, num_atoms) =
        make_uint4(words[0], words[1], words[2], words[3]);
  }
}

// Quantises rows of bf16 by the rule of quantize_fp8, with amax given, and writes their image. One
// block per padded row; `width` is a multiple of 128.
__global__ void __launch_bounds__(kQuantizeThreads)
    QuantizeTokenImage(const __nv_bfloat16* __restrict__ h, const uint32_t* __restrict__ amax_bits,
                       uint8_t* __restrict__ image, float* __restrict__ row_scale, int num_experts,
                       int width, int num_atoms, Plan plan) {
  const int64_t row = RowOfPadded(blockIdx.x, num_experts, plan);
  const int chunks = width / 16;
  if (row < 0) {
    for (int chunk = threadIdx.x; chunk < chunks; chunk += kQuantizeThreads) {
      *ImageChunk(image, blockIdx.x, chunk, num_atoms) = make_uint4(0, 0, 0, 0);
    }
    return;
  }
  const float inv_scale = FinishScale(amax_bits[row], threadIdx.x == 0, row_scale + row);
  for (int chunk = threadIdx.x; chunk < chunks; chunk += kQuantizeThreads) {
    uint32_t words[4];
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      const int k = chunk / 8 * 128 + 32 * t + 4 * (chunk % 8);
      const uint2 four = *reinterpret_cast<const uint2*>(h + row * width + k);
      words[t] = PackE4m3x4(__fmul_rn(LowBf16ToFloat(four.x), inv_scale),
                            __fmul_rn(HighBf16ToFloat(four.x), inv_scale),
                            __fmul_rn(LowBf16ToFloat(four.y), inv_scale),
                            __fmul_rn(HighBf16ToFloat(four.y), inv_scale));
    }
    *ImageChunk(image, blockIdx.x, chunk, num_atoms) =
        make_uint4(words[0], words[1], words[2], words[3]);
  }
}

}  // namespace jax_w4moe
