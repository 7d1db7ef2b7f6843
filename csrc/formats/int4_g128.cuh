// INT4 records with an f32 scale per 128 of K on the device: from shared memory to WGMMA A
// fragments in E4M3, exactly.
//
// The byte map is docs/layout.md; jax_w4moe/formats/{layout,int4}.py write it.
#pragma once

#include <cstdint>

#include "common/limits.h"
#include "ptx/sm90.cuh"

namespace jax_w4moe {

struct Int4G128 {
  static constexpr int kTableBytes = 0;
  static __device__ __forceinline__ uint8_t TableByte(int) { return 0; }

  struct Tables {};
  static __device__ __forceinline__ Tables LoadTables(uint32_t, int, uint32_t) { return {}; }

  // The A fragments of instructions (m64k32 each) 2 kPlane and 2 kPlane + 1, for thread `thread` of
  // the warpgroup.
  template <int kPlane>
  static __device__ __forceinline__ void LoadPlane(uint32_t record, int thread, const Tables&,
                                                   uint32_t (&a)[4][4]) {
    const uint4 codes = ptx::LoadShared128(record + kPlane * 2048 + thread * 16);
    Decode(codes.x, a[2 * kPlane][0], a[2 * kPlane][2]);
    Decode(codes.y, a[2 * kPlane][1], a[2 * kPlane][3]);
    Decode(codes.z, a[2 * kPlane + 1][0], a[2 * kPlane + 1][2]);
    Decode(codes.w, a[2 * kPlane + 1][1], a[2 * kPlane + 1][3]);
  }

  // The f32 scales of rows g and g + 8.
  static __device__ __forceinline__ void LoadScale(uint32_t record, int thread, float (&scale)[2]) {
    const int pair = thread / 32 * 8 + thread % 32 / 4;
    const uint2 words = ptx::LoadShared64(record + 4096 + pair * 8);
    scale[0] = __uint_as_float(words.x);
    scale[1] = __uint_as_float(words.y);
  }

 private:
  // Eight codes to two registers of four E4M3.
  static __device__ __forceinline__ void Decode(uint32_t codes, uint32_t& first, uint32_t& second) {
    first = Decode4(codes);
    second = Decode4(codes >> 4);
  }

  // A nibble 2 m + s, s the sign, is the value m, or -m - 1. E4M3 bytes from 0 to 16 count up in
  // steps: 2 (m + s) of them, and the sign bit.
  static __device__ __forceinline__ uint32_t Decode4(uint32_t nibbles) {
    return (nibbles & 0x01010101u) * 0x82u + (nibbles & 0x0e0e0e0eu);
  }
};

}  // namespace jax_w4moe
