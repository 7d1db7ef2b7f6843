// INT4 records with an f32 scale per 128 of K on the device.
#pragma once

#include "formats/int4.cuh"

namespace jax_w4moe {

struct Int4G128 : Int4Codes {
  using Scales = float2;
  static __device__ __forceinline__ Scales LoadScales(uint32_t record, const RecordThread& thread) {
    const uint2 words = ScaleWords(record, thread);
    return {__uint_as_float(words.x), __uint_as_float(words.y)};
  }
  static __device__ __forceinline__ float Scale(const Scales& scales, int, int half) {
    return half ? scales.y : scales.x;
  }
};

}  // namespace jax_w4moe
