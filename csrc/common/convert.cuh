// Conversions between bf16, f32 and FP8; plain functions on registers, no memory access.
//
// The rounding to FP8 is the hardware's cvt.rn.satfinite (PTX ISA, "cvt"): to nearest even, values
// beyond the largest (448 of E4M3, 57,344 of E5M2) saturate, NaN becomes NaN.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp8.h>

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

// The FP8 formats, by what cuda_fp8.h calls their interpretation.
struct E4m3 {
  static constexpr __nv_fp8_interpretation_t kInterpretation = __NV_E4M3;
};
struct E5m2 {
  static constexpr __nv_fp8_interpretation_t kInterpretation = __NV_E5M2;
};

// Four f32 to four FP8 numbers in one word, v0 in the lowest byte.
template <typename Fp8>
__device__ __forceinline__ uint32_t PackFp8x4(float v0, float v1, float v2, float v3) {
  const uint32_t low =
      __nv_cvt_float2_to_fp8x2(make_float2(v0, v1), __NV_SATFINITE, Fp8::kInterpretation);
  const uint32_t high =
      __nv_cvt_float2_to_fp8x2(make_float2(v2, v3), __NV_SATFINITE, Fp8::kInterpretation);
  return low | high << 16;
}

// The inverse, exactly.
template <typename Fp8>
__device__ __forceinline__ void UnpackFp8x4(uint32_t packed, float (&values)[4]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const auto pair = static_cast<__nv_fp8x2_storage_t>(packed >> (16 * i));
    const __half2_raw halves = __nv_cvt_fp8x2_to_halfraw2(pair, Fp8::kInterpretation);
    const float2 floats = __half22float2(__half2(halves));
    values[2 * i] = floats.x;
    values[2 * i + 1] = floats.y;
  }
}

// One f32 to the byte of an e4m3.
__device__ __forceinline__ uint8_t ToE4m3(float v) {
  return static_cast<uint8_t>(PackFp8x4<E4m3>(v, 0.0f, 0.0f, 0.0f));
}

}  // namespace jax_w4moe
