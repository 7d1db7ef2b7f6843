// Rows of activations as what a token image is made from, by chunks of 16 values.
//
// A source has rows of `width` values, a multiple of 32. Load: what a chunk is made from. AbsMax:
// its part of Finish's amax_bits, the row's maximum, if NeedsAmax. Finish: what chunks are
// multiplied by, and the row's scale. Convert: a chunk as the image has it.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "common/scale_rule.h"
#include "formats/formats.h"
#include "kernels/quantize_row.cuh"

namespace jax_w4moe {

// The K of word t of a chunk of the image, which is for half chunk % 2 of an instruction.
__device__ __forceinline__ int ChunkK(KOrder order, int chunk, int t) {
  const bool is_by_lane = order == KOrder::kByLane;
  return chunk / 8 * 128 + (is_by_lane ? 32 : 4) * t + (is_by_lane ? 4 : 16) * (chunk % 8);
}

// bf16, quantised by a rule.
struct Bf16Rows {
  const __nv_bfloat16* x;
  int width;
  KOrder order;
  ScaleRule rule;

  struct Raw {
    uint2 fours[4];
  };
  __device__ __forceinline__ Raw Load(int64_t row, int chunk) const {
    Raw raw;
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      const int k = ChunkK(order, chunk, t);
      raw.fours[t] = k < width ? *reinterpret_cast<const uint2*>(x + row * width + k) : uint2{0, 0};
    }
    return raw;
  }
  static __device__ __forceinline__ uint32_t AbsMax(const Raw& raw) {
    const uint2(&f)[4] = raw.fours;
    return max(AbsMaxBits(make_uint4(f[0].x, f[0].y, f[1].x, f[1].y)),
               AbsMaxBits(make_uint4(f[2].x, f[2].y, f[3].x, f[3].y)));
  }
  __device__ __forceinline__ bool NeedsAmax() const { return rule.fixed == 0.0f; }
  __device__ __forceinline__ float Finish(int64_t, uint32_t amax_bits, float& scale) const {
    if (rule.fixed > 0.0f) {
      scale = rule.fixed;
      return __fdiv_rn(1.0f, rule.fixed);
    }
    return rule.pow2 ? FinishPow2Scale(amax_bits, &scale) : FinishScale(amax_bits, true, &scale);
  }
  using Value = uint4;
  static __device__ __forceinline__ void Convert(const Raw& raw, float inv_scale, Value& value) {
    value = make_uint4(Quantize(raw.fours[0], inv_scale), Quantize(raw.fours[1], inv_scale),
                       Quantize(raw.fours[2], inv_scale), Quantize(raw.fours[3], inv_scale));
  }
};

// bf16 as the sum of two FP8 numbers: E5M2 has three significant bits, E4M3 four more and the sign
// of what the first left. With the row's largest magnitude in [2^11, 2^12) a value down to 2^-2 of
// these units is exact; a smaller one is right to 2^-10, which is 2^-21 of the largest at most.
struct SplitBf16Rows : Bf16Rows {
  __device__ __forceinline__ Raw Load(int64_t row, int chunk) const {
    Raw raw = Bf16Rows::Load(row, chunk);
    if (rule.per_128) RoundPer128(raw);
    return raw;
  }
  // A power of two; of a row that holds an infinity or NaN, NaN.
  static __device__ __forceinline__ bool NeedsAmax() { return true; }
  __device__ __forceinline__ float Finish(int64_t, uint32_t amax_bits, float& scale) const {
    const uint32_t exponent = max(amax_bits, kMinAmaxBits) >> 23;
    scale = __uint_as_float((exponent - 11) << 23);
    return __uint_as_float(exponent == 255 ? 0x7fffffffu : (254 + 11 - exponent) << 23);
  }
  using Value = uint4[2];  // what the first leaves, the first
  static __device__ __forceinline__ void Convert(const Raw& raw, float inv_scale, Value& value) {
    uint2 words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i] = Split(raw.fours[i], inv_scale);
    value[0] = make_uint4(words[0].x, words[1].x, words[2].x, words[3].x);
    value[1] = make_uint4(words[0].y, words[1].y, words[2].y, words[3].y);
  }

 private:
  static __device__ __forceinline__ uint2 Split(uint2 four, float inv_scale) {
    const float values[4] = {
        LowBf16ToFloat(four.x) * inv_scale, HighBf16ToFloat(four.x) * inv_scale,
        LowBf16ToFloat(four.y) * inv_scale, HighBf16ToFloat(four.y) * inv_scale};
    const uint32_t high = PackFp8x4<E5m2>(values[0], values[1], values[2], values[3]);
    float first[4];
    UnpackFp8x4<E5m2>(high, first);
    return {PackFp8x4<E4m3>(values[0] - first[0], values[1] - first[1], values[2] - first[2],
                            values[3] - first[3]),
            high};
  }
  // To E4M3 under a scale that is a power of two, and back. Eight neighbouring threads have 128
  // values.
  static __device__ __forceinline__ void RoundPer128(Raw& raw) {
    uint32_t amax_bits = AbsMax(raw);
    const uint32_t mask = TeamLanes<8>();
#pragma unroll
    for (int lanes = 1; lanes < 8; lanes *= 2) {
      amax_bits = max(amax_bits, __shfl_xor_sync(mask, amax_bits, lanes));
    }
    float scale;
    const float inv_scale = FinishPow2Scale(amax_bits, &scale);
#pragma unroll
    for (uint2& four : raw.fours) {
      float values[4];
      UnpackFp8x4<E4m3>(Quantize(four, inv_scale), values);
      four = {PackBf16(values[0] * scale, values[1] * scale),
              PackBf16(values[2] * scale, values[3] * scale)};
    }
  }
};

// E4M3 with a scale per row.
struct Fp8Rows {
  const uint8_t* x;
  const float* x_scale;
  int width;
  KOrder order;

  using Raw = uint4;
  __device__ __forceinline__ Raw Load(int64_t row, int chunk) const {
    uint32_t words[4] = {0, 0, 0, 0};
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      const int k = ChunkK(order, chunk, t);
      if (k < width) words[t] = *reinterpret_cast<const uint32_t*>(x + row * width + k);
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
  }
  static __device__ __forceinline__ uint32_t AbsMax(const Raw&) { return 0; }
  static __device__ __forceinline__ bool NeedsAmax() { return false; }
  __device__ __forceinline__ float Finish(int64_t row, uint32_t, float& scale) const {
    scale = x_scale[row];
    return 1.0f;
  }
  using Value = uint4;
  static __device__ __forceinline__ void Convert(const Raw& raw, float, Value& value) {
    value = raw;
  }
};

}  // namespace jax_w4moe
