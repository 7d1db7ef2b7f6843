// E2M1 codes on the device as they are, without their scales: from shared memory to WGMMA A
// fragments.
#pragma once

#include <cstdint>

#include "formats/record.cuh"
#include "ptx/sm90.cuh"

namespace jax_w4moe {

// What decoders share whose scales all enter the promotion (formats/mxfp4.cuh says what a decoder
// has, and how a word of eight codes is braided).
struct E2m1Codes : CodesWithoutTable<E2m1Codes> {
  static constexpr bool kFewWidths = true;

  static __device__ __forceinline__ void Decode(uint32_t codes, uint32_t& first, uint32_t& second) {
    // E4M3 of the magnitudes 0, .5, 1, 1.5 and 2, 3, 4, 6.
    constexpr uint32_t kLow = 0x3C383000, kHigh = 0x4C484440;
    const uint32_t selector = codes & 0x77777777u;
    first = ptx::Permute(kLow, kHigh, selector) | (codes & 0x80808080u);
    second = ptx::Permute(kLow, kHigh, ptx::UpperHalf(selector)) | (codes << 4 & 0x80808080u);
  }
};

}  // namespace jax_w4moe
