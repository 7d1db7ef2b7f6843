// E2M1 codes on the device as they are, without their scales: from shared memory to WGMMA A
// fragments.
#pragma once

#include <cstdint>

#include "formats/record.cuh"
#include "ptx/sm90.cuh"

namespace jax_w4moe {

// What decoders share whose scales all enter the promotion (formats/mxfp4.cuh says what a decoder
// has, and how a word of eight codes is braided).
struct E2m1Codes {
  static constexpr bool kFewWidths = true;
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
  // E4M3 of the magnitudes 0, .5, 1, 1.5 and 2, 3, 4, 6.
  static constexpr uint32_t kLow = 0x3C383000, kHigh = 0x4C484440;

  // Eight codes to two registers of four E4M3.
  static __device__ __forceinline__ void Decode(uint32_t codes, uint32_t& first, uint32_t& second) {
    const uint32_t selector = codes & 0x77777777u;
    first = ptx::Permute(kLow, kHigh, selector) | (codes & 0x80808080u);
    second = ptx::Permute(kLow, kHigh, selector >> 16) | (codes << 4 & 0x80808080u);
  }
};

}  // namespace jax_w4moe
