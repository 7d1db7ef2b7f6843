// Kernels of quantize_fp8: bf16[T, H] -> e4m3[T, H] and one f32 scale per row, all row-major; the
// rule is in kernels/quantize_row.cuh.
//
// A team of kTeam threads owns a row. The vector path keeps the first kKeptVectors 16-byte vectors
// of each thread in registers, so a row of up to kTeam * 32 elements is read once; what is longer
// is read a second time, normally from L2.
#pragma once

#include <cstdint>

#include "kernels/quantize_row.cuh"

namespace jax_w4moe {

inline constexpr int kKeptVectors = 4;  // per thread

// Vector path: hidden_size is a multiple of 8, x is 16-byte and x_fp8 8-byte aligned.
template <int kTeam>
__global__ void __launch_bounds__(kQuantizeThreads)
    QuantizeFp8Vector(const uint4* __restrict__ x, uint2* __restrict__ x_fp8,
                      float* __restrict__ x_scale, int64_t num_tokens, int64_t row_vectors) {
  constexpr int kRowsPerBlock = kQuantizeThreads / kTeam;
  const int lane = threadIdx.x % kTeam;
  const int64_t first = int64_t{blockIdx.x} * kRowsPerBlock + threadIdx.x / kTeam;
  for (int64_t row = first; row < num_tokens; row += int64_t{gridDim.x} * kRowsPerBlock) {
    const uint4* row_in = x + row * row_vectors;
    uint2* row_out = x_fp8 + row * row_vectors;

    uint4 kept[kKeptVectors];
    uint32_t amax_bits = 0;
#pragma unroll
    for (int i = 0; i < kKeptVectors; ++i) {
      const int64_t v = lane + i * kTeam;
      kept[i] = v < row_vectors ? row_in[v] : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int i = 0; i < kKeptVectors; ++i) amax_bits = max(amax_bits, AbsMaxBits(kept[i]));
    for (int64_t v = lane + kKeptVectors * kTeam; v < row_vectors; v += kTeam) {
      amax_bits = max(amax_bits, AbsMaxBits(row_in[v]));
    }

    const float inv_scale = FinishScale(TeamMax<kTeam>(amax_bits), lane == 0, x_scale + row);

#pragma unroll
    for (int i = 0; i < kKeptVectors; ++i) {
      const int64_t v = lane + i * kTeam;
      if (v < row_vectors) row_out[v] = Quantize(kept[i], inv_scale);
    }
    for (int64_t v = lane + kKeptVectors * kTeam; v < row_vectors; v += kTeam) {
      row_out[v] = Quantize(row_in[v], inv_scale);
    }
  }
}

// Scalar path: any hidden_size and any alignment, one block per row; correct, not fast.
__global__ void __launch_bounds__(kQuantizeThreads)
    QuantizeFp8Scalar(const uint16_t* __restrict__ x, uint8_t* __restrict__ x_fp8,
                      float* __restrict__ x_scale, int64_t num_tokens, int64_t hidden_size) {
  for (int64_t row = blockIdx.x; row < num_tokens; row += gridDim.x) {
    const uint16_t* row_in = x + row * hidden_size;
    uint8_t* row_out = x_fp8 + row * hidden_size;
    uint32_t amax_bits = 0;
    for (int64_t h = threadIdx.x; h < hidden_size; h += kQuantizeThreads) {
      amax_bits = max(amax_bits, (row_in[h] & 0x7fffu) << 16);
    }
    const float inv_scale =
        FinishScale(TeamMax<kQuantizeThreads>(amax_bits), threadIdx.x == 0, x_scale + row);
    for (int64_t h = threadIdx.x; h < hidden_size; h += kQuantizeThreads) {
      row_out[h] = ToE4m3(__fmul_rn(LowBf16ToFloat(row_in[h]), inv_scale));
    }
  }
}

}  // namespace jax_w4moe
