// Kernel of quantize_fp8: bf16[T, H] -> e4m3[T, H] and one f32 scale per row, all row-major.
//
// The rule, which jax_w4moe.quantization.quantize_per_token states in jax.numpy and which must
// stay equal to it bit for bit:
//   amax    = max over the row of |x| as an integer maximum of the f32 bits (so NaN wins and the
//             order does not matter), but at least 2^-100 (so an all-zero row has a finite scale)
//   x_scale = amax * f32(1/448)
//   x_fp8   = e4m3(x * (448 / amax)), round to nearest even, saturating, NaN stays NaN
//
// A team of kTeam threads owns a row. The vector path keeps the first kKeptVectors 16-byte vectors
// of each thread in registers, so a row of up to kTeam * 32 elements is read once; what is longer
// is read a second time, normally from L2.
#pragma once

#include <cstdint>

#include "common/fp8.cuh"

namespace jax_w4moe {

inline constexpr int kQuantizeThreads = 256;                   // per block
inline constexpr int kKeptVectors = 4;                         // per thread
inline constexpr int kVectorElements = 8;                      // bf16 values in 16 bytes
inline constexpr uint32_t kMinAmaxBits = (127u - 100u) << 23;  // 2^-100

// Largest f32 magnitude in a vector of 8 bf16, as bits; the sign bits are masked off.
__device__ __forceinline__ uint32_t AbsMaxBits(uint4 v) {
  constexpr uint32_t kMagnitude = 0x7fff7fffu;
  uint32_t pair = __vmaxu2(__vmaxu2(v.x & kMagnitude, v.y & kMagnitude),
                           __vmaxu2(v.z & kMagnitude, v.w & kMagnitude));
  return max(pair << 16, pair & 0xffff0000u);
}

__device__ __forceinline__ uint2 Quantize(uint4 v, float inv_scale) {
  auto low = [inv_scale](uint32_t w) { return __fmul_rn(LowBf16ToFloat(w), inv_scale); };
  auto high = [inv_scale](uint32_t w) { return __fmul_rn(HighBf16ToFloat(w), inv_scale); };
  return make_uint2(PackE4m3x4(low(v.x), high(v.x), low(v.y), high(v.y)),
                    PackE4m3x4(low(v.z), high(v.z), low(v.w), high(v.w)));
}

// Maximum over a team: a warp, or the whole block.
template <int kTeam>
__device__ __forceinline__ uint32_t TeamMax(uint32_t value) {
  value = __reduce_max_sync(0xffffffffu, value);
  if constexpr (kTeam > 32) {
    static_assert(kTeam == kQuantizeThreads, "a team is one warp or one block");
    __shared__ uint32_t warp_max[kTeam / 32];
    __syncthreads();  // the previous row's maxima have been read
    if (threadIdx.x % 32 == 0) warp_max[threadIdx.x / 32] = value;
    __syncthreads();
    value = warp_max[0];
#pragma unroll
    for (int w = 1; w < kTeam / 32; ++w) value = max(value, warp_max[w]);
  }
  return value;
}

// Writes the row's scale and returns the factor that x is multiplied with.
__device__ __forceinline__ float FinishScale(uint32_t amax_bits, bool write, float* x_scale) {
  float amax = __uint_as_float(max(amax_bits, kMinAmaxBits));
  if (write) *x_scale = __fmul_rn(amax, 1.0f / kE4m3Max);
  return __fdiv_rn(kE4m3Max, amax);
}

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
