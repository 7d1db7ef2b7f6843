// E2M1 codes on the device: to registers, and as WGMMA A fragments without their scales.
#pragma once

#include <cstdint>

#include "formats/record.cuh"
#include "ptx/sm90.cuh"

namespace jax_w4moe {

// Eight codes, braided as docs/layout.md says, to two registers of four E4M3, by the E4M3 of the
// eight magnitudes.
__device__ __forceinline__ void DecodeE2m1(uint32_t codes, uint2 magnitudes, uint32_t& first,
                                           uint32_t& second) {
  const uint32_t selector = codes & 0x77777777u;
  first = ptx::Permute(magnitudes.x, magnitudes.y, selector) | (codes & 0x80808080u);
  second = ptx::Permute(magnitudes.x, magnitudes.y, ptx::UpperHalf(selector)) |
           (codes << 4 & 0x80808080u);
}

// What decoders share whose scales all enter the promotion (formats/mxfp4.cuh says what a decoder
// has).
struct E2m1Codes : CodesWithoutTable<E2m1Codes> {
  static constexpr bool kFewWidths = true;

  static __device__ __forceinline__ void Decode(uint32_t codes, uint32_t& first, uint32_t& second) {
    // Of 0, .5, 1, 1.5 and 2, 3, 4, 6.
    DecodeE2m1(codes, make_uint2(0x3C383000, 0x4C484440), first, second);
  }
};

}  // namespace jax_w4moe
