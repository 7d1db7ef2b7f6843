// INT4 codes on the device: from shared memory to WGMMA A fragments, exactly.
//
// The byte map is docs/layout.md; jax_w4moe/formats/{layout,int4}.py write it. A nibble 2 m + s, s
// the sign, is the value m, or -m - 1.
#pragma once

#include <cstdint>

#include "formats/record.cuh"

namespace jax_w4moe {

// What decoders of INT4 share (formats/mxfp4.cuh says what a decoder has).
struct Int4Codes : CodesWithoutTable<Int4Codes> {
  static constexpr bool kFewWidths = false;

  static __device__ __forceinline__ void Decode(uint32_t codes, uint32_t& first, uint32_t& second) {
    first = DecodeFour(codes);
    second = DecodeFour(codes >> 4);
  }

 private:
  // E4M3 bytes from 0 to 16 count up in steps: 2 (m + s) of them, and the sign bit.
  static __device__ __forceinline__ uint32_t DecodeFour(uint32_t nibbles) {
    return (nibbles & 0x01010101u) * 0x82u + (nibbles & 0x0e0e0e0eu);
  }
};

}  // namespace jax_w4moe
