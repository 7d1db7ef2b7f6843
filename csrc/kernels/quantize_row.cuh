// The rule of quantize_fp8 for one row, as device functions; the kernels that use it are
// quantize_fp8 and the requantisation between the two GEMMs.
//
// The rule, which jax_w4moe.quantization.quantize_per_token states in jax.numpy and which must
// stay equal to it bit for bit:
//   amax    = max over the row of |x| as an integer maximum of the f32 bits (so NaN wins and the
//             order does not matter), but at least 2^-100 (so an all-zero row has a finite scale)
//   x_scale = amax * f32(1/448)
//   x_fp8   = e4m3(x * (448 / amax)), round to nearest even, saturating, NaN stays NaN
#pragma once

#include <cstdint>

#include "common/convert.cuh"

namespace jax_w4moe {

inline constexpr int kQuantizeThreads = 256;                   // per block
inline constexpr int kVectorElements = 8;                      // bf16 values in 16 bytes
inline constexpr uint32_t kMinAmaxBits = (127u - 100u) << 23;  // 2^-100

// Largest f32 magnitude in a vector of 8 bf16, as bits; the sign bits are masked off.
__device__ __forceinline__ uint32_t AbsMaxBits(uint4 v) {
  constexpr uint32_t kMagnitude = 0x7fff7fffu;
  uint32_t pair = __vmaxu2(__vmaxu2(v.x & kMagnitude, v.y & kMagnitude),
                           __vmaxu2(v.z & kMagnitude, v.w & kMagnitude));
  return max(pair << 16, pair & 0xffff0000u);
}

// Four bf16 to four e4m3.
__device__ __forceinline__ uint32_t Quantize(uint2 v, float inv_scale) {
  return PackFp8x4<E4m3>(
      __fmul_rn(LowBf16ToFloat(v.x), inv_scale), __fmul_rn(HighBf16ToFloat(v.x), inv_scale),
      __fmul_rn(LowBf16ToFloat(v.y), inv_scale), __fmul_rn(HighBf16ToFloat(v.y), inv_scale));
}

// Eight.
__device__ __forceinline__ uint2 Quantize(uint4 v, float inv_scale) {
  return make_uint2(Quantize(make_uint2(v.x, v.y), inv_scale),
                    Quantize(make_uint2(v.z, v.w), inv_scale));
}

// A row's threads are a team: all kTeam of a block, a warp, or an aligned part of one. The lanes of
// the calling thread's warp that are of its team.
template <int kTeam>
__device__ __forceinline__ uint32_t TeamLanes() {
  if constexpr (kTeam >= 32) {
    return ~0u;
  } else {
    return ((1u << kTeam) - 1) << (threadIdx.x % 32 / kTeam * kTeam);
  }
}

// Maximum over a team.
template <int kTeam>
__device__ __forceinline__ uint32_t TeamMax(uint32_t value) {
  value = __reduce_max_sync(TeamLanes<kTeam>(), value);
  if constexpr (kTeam > 32) {
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

// The same with a scale that is a power of two, as PerToken(pow2=True) says.
__device__ __forceinline__ float FinishPow2Scale(uint32_t amax_bits, float* x_scale) {
  const uint32_t bits = max(amax_bits, kMinAmaxBits);
  // 448 is 1.75 * 2^8: up to a mantissa of 1.75 amax / 448 is at most 2^(e - 8).
  const uint32_t exponent = (bits >> 23) - 8 + ((bits & 0x7fffff) > 0x600000);
  const bool is_finite = bits < 0x7f800000;
  const float amax = __uint_as_float(bits);
  *x_scale = is_finite ? __uint_as_float(exponent << 23) : amax;
  const float inverse = bits == 0x7f800000 ? 0.0f : amax;  // 448 over an infinity, or NaN
  return is_finite ? __uint_as_float((254 - exponent) << 23) : inverse;
}

}  // namespace jax_w4moe
