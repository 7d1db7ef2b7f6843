// Conversions between bf16, f32 and FP8; plain functions on registers, no memory access.
//
// The rounding to FP8 is the hardware's cvt.rn.satfinite (PTX ISA, "cvt"): to nearest even, values
// beyond the largest (448 of E4M3, 57,344 of E5M2) saturate, NaN becomes NaN.
#pragma once

#include <cuda_bf16.h>
#include <cutlass/numeric_conversion.h>

#include <cstdint>

namespace jax_w4moe {

inline constexpr float kE4m3Max = 448.0f;

// The two bf16 halves of a word as f32; exact, since bf16 is the upper half of an f32.
__device__ __forceinline__ float LowBf16ToFloat(uint32_t word) {
  return __uint_as_float(word << 16);
}
__device__ __forceinline__ float HighBf16ToFloat(uint32_t word) {
  return __uint_as_float(word & 0xffff0000u);
}

// Two f32 to the bf16 halves of a word, rounded to nearest even.
__device__ __forceinline__ uint32_t PackBf16(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

using E4m3 = cutlass::float_e4m3_t;
using E5m2 = cutlass::float_e5m2_t;

// Four f32 to four FP8 numbers in one word, v0 in the lowest byte.
template <typename Fp8>
__device__ __forceinline__ uint32_t PackFp8x4(float v0, float v1, float v2, float v3) {
  cutlass::Array<float, 4> values;
  values[0] = v0;
  values[1] = v1;
  values[2] = v2;
  values[3] = v3;
  const auto packed = cutlass::NumericArrayConverter<Fp8, float, 4>::convert(values);
  return reinterpret_cast<const uint32_t&>(packed);
}

// The inverse, exactly.
template <typename Fp8>
__device__ __forceinline__ void UnpackFp8x4(uint32_t packed, float (&values)[4]) {
  const auto unpacked = cutlass::NumericArrayConverter<float, Fp8, 4>::convert(
      reinterpret_cast<const cutlass::Array<Fp8, 4>&>(packed));
#pragma unroll
  for (int i = 0; i < 4; ++i) values[i] = unpacked[i];
}

// One f32 to the byte of an e4m3.
__device__ __forceinline__ uint8_t ToE4m3(float v) {
  return static_cast<uint8_t>(PackFp8x4<E4m3>(v, 0.0f, 0.0f, 0.0f));
}

}  // namespace jax_w4moe
