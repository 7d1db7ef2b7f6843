// INT4 records with a bf16 scale per 32 of K on the device: each instruction's product is promoted
// by itself.
#pragma once

#include "common/convert.cuh"
#include "formats/int4.cuh"

namespace jax_w4moe {

struct Int4G32 : Int4Codes {
  // Two bf16 a word.
  using Scales = uint4;
  static __device__ __forceinline__ Scales LoadScales(uint32_t record, const RecordThread& thread) {
    return ScaleWordPairs(record, thread);
  }
  static __device__ __forceinline__ float Scale(const Scales& s, int group, int half) {
    const uint32_t word = half ? (group < 2 ? s.z : s.w) : (group < 2 ? s.x : s.y);
    return group % 2 ? HighBf16ToFloat(word) : LowBf16ToFloat(word);
  }
};

}  // namespace jax_w4moe
