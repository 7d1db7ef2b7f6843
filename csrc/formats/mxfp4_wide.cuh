// MXFP4 records with scales any distance apart on the device: each instruction's product is
// promoted by itself.
#pragma once

#include "formats/e2m1.cuh"

namespace jax_w4moe {

struct Mxfp4Wide : E2m1Codes {
  // Four E8M0 bytes of each row.
  using Scales = uint2;
  static __device__ __forceinline__ Scales LoadScales(uint32_t record, const RecordThread& thread) {
    return ScaleWords(record, thread);
  }
  static __device__ __forceinline__ float Scale(const Scales& s, int group, int half) {
    const uint32_t byte = (half ? s.y : s.x) >> 8 * group & 0xff;
    return __uint_as_float(byte ? byte << 23 : 0x400000u);  // 2^-127 is subnormal
  }
};

}  // namespace jax_w4moe
