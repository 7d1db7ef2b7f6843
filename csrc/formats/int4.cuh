// INT4 codes on the device: from shared memory to WGMMA A fragments, exactly.
//
// The byte map is docs/layout.md; jax_w4moe/formats/{layout,int4}.py write it. A nibble 2 m + s, s
// the sign, is the value m, or -m - 1.
#pragma once

#include <cstdint>

#include "formats/record.cuh"

namespace jax_w4moe {

// What decoders of INT4 share (formats/mxfp4.cuh says what a decoder has).
struct Int4Codes {
  static constexpr bool kFewWidths = false;
  static constexpr int kTableBytes = 0;  // none
  static __device__ __forceinline__ uint8_t TableByte(int) { return 0; }

  struct Tables {};
  static __device__ __forceinline__ Tables LoadTables(uint32_t, int, uint32_t) { return {}; }

  template <int kPlane>
  static __device__ __forceinline__ void LoadPlane(uint32_t record, int thread, const Tables&,
                                                   uint32_t (&a)[4][4]) {
    const uint4 codes = Codes<kPlane>(record, thread);
    Decode(codes.x, a[2 * kPlane][0], a[2 * kPlane][2]);
    Decode(codes.y, a[2 * kPlane][1], a[2 * kPlane][3]);
    Decode(codes.z, a[2 * kPlane + 1][0], a[2 * kPlane + 1][2]);
    Decode(codes.w, a[2 * kPlane + 1][1], a[2 * kPlane + 1][3]);
  }

 private:
  // Eight codes to two registers of four E4M3.
  static __device__ __forceinline__ void Decode(uint32_t codes, uint32_t& first, uint32_t& second) {
    first = DecodeFour(codes);
    second = DecodeFour(codes >> 4);
  }
  // E4M3 bytes from 0 to 16 count up in steps: 2 (m + s) of them, and the sign bit.
  static __device__ __forceinline__ uint32_t DecodeFour(uint32_t nibbles) {
    return (nibbles & 0x01010101u) * 0x82u + (nibbles & 0x0e0e0e0eu);
  }
};

}  // namespace jax_w4moe
