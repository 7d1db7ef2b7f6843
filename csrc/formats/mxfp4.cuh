// MXFP4 records on the device: from shared memory to WGMMA A fragments in E4M3, exactly.
//
// The byte map is docs/layout.md; jax_w4moe/formats/{layout,mxfp4}.py write it.
#pragma once

#include <cstdint>

#include "common/limits.h"
#include "ptx/sm90.cuh"

namespace jax_w4moe {

struct Mxfp4 {
  // 16 rows of 8 bytes: row `index` holds E4M3 of the eight magnitudes times 2^(index - 9); row 0,
  // the all-zero group, holds zeros. Eight-byte loads of any lanes touch each bank once.
  static constexpr int kTableBytes = 128;

  // Byte i of the table, for thread i of 128.
  static __device__ __forceinline__ uint8_t TableByte(int i) {
    const int index = i / 8, magnitude = i % 8;
    // 0, .5, 1, 1.5, 2, 3, 4, 6 as small integers times one half.
    const int halves = magnitude < 4 ? magnitude : (magnitude & 1 ? 3 : 2) << (magnitude / 2 - 1);
    if (index == 0 || halves == 0) return 0;
    const int top = 31 - __clz(halves);
    const int exponent = top - 1 + index - 9;  // of the value: halves / 2 * 2^(index - 9)
    if (exponent < -6) return static_cast<uint8_t>(halves << (index - 1));  // in units of 2^-9
    return static_cast<uint8_t>((exponent + 7) << 3 | ((halves << 3 >> top) & 7));
  }

  // The A fragments of four instructions (m64k32 each) and the f32 scales of rows g and g + 8, for
  // thread `thread` of the warpgroup.
  static __device__ __forceinline__ void Load(uint32_t record, int thread, uint32_t table,
                                              uint32_t (&a)[4][4], float (&scale)[2]) {
    const int pair = thread / 32 * 8 + thread % 32 / 4;
    const uint2 words = ptx::LoadShared64(record + 4096 + pair * 8);
    const uint4 plane0 = ptx::LoadShared128(record + thread * 16);
    const uint4 plane1 = ptx::LoadShared128(record + 2048 + thread * 16);
    const int shift = thread % 4 * 4;
    const uint2 low = ptx::LoadShared64(table + (words.x >> shift & 0x78));
    const uint2 high = ptx::LoadShared64(table + (words.y >> shift & 0x78));
    Decode(plane0.x, low, a[0][0], a[0][2]);
    Decode(plane0.y, high, a[0][1], a[0][3]);
    Decode(plane0.z, low, a[1][0], a[1][2]);
    Decode(plane0.w, high, a[1][1], a[1][3]);
    Decode(plane1.x, low, a[2][0], a[2][2]);
    Decode(plane1.y, high, a[2][1], a[2][3]);
    Decode(plane1.z, low, a[3][0], a[3][2]);
    Decode(plane1.w, high, a[3][1], a[3][3]);
    scale[0] = __uint_as_float(words.x & 0x7f800000u);
    scale[1] = __uint_as_float(words.y & 0x7f800000u);
  }

 private:
  // Eight codes to two registers of four E4M3.
  static __device__ __forceinline__ void Decode(uint32_t codes, uint2 table, uint32_t& first,
                                                uint32_t& second) {
    const uint32_t selector = codes & 0x77777777u;
    first = ptx::Permute(table.x, table.y, selector) | (codes & 0x80808080u);
    second = ptx::Permute(table.x, table.y, selector >> 16) | (codes << 4 & 0x80808080u);
  }
};

}  // namespace jax_w4moe
