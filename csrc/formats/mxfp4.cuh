// MXFP4 records on the device: from shared memory to WGMMA A fragments, exactly.
//
// The byte map is docs/layout.md; jax_w4moe/formats/{layout,mxfp4}.py write it. A decoder has:
//   kTableBytes, TableByte   a table in shared memory, and its bytes
//   Tables, LoadTables       what a thread keeps of it for a record
//   DecodePlane              the A fragments of one of a record's two planes (two WGMMAs, each
//                            m64k32), from its codes
//   kFewWidths               few widths of tiles are compiled: long code that is rarely used
//   Scales, LoadScales       what a thread keeps of the scales of rows g and g + 8
//   Scale                    the f32 of a group (FormatTraits::kGroups), of one of the two
#pragma once

#include <cstdint>

#include "formats/e2m1.cuh"
#include "formats/record.cuh"
#include "ptx/sm90.cuh"

namespace jax_w4moe {

struct Mxfp4 {
  static constexpr bool kFewWidths = false;
  // 16 rows of 8 bytes: row `index` holds E4M3 of the eight magnitudes times 2^(index - 9); row 0,
  // the all-zero group, holds zeros. Eight-byte loads of any lanes touch each bank once.
  static constexpr int kTableBytes = 128;

  // Byte i of the table, for thread i of 128.
  static __device__ __forceinline__ uint8_t TableByte(int i) {
    const int index = i / 8, magnitude = i % 8;
    // Of the magnitude: 0, .5, 1, 1.5, 2, 3, 4, 6.
    const int halves = magnitude < 4 ? magnitude : (magnitude & 1 ? 3 : 2) << (magnitude / 2 - 1);
    if (index == 0 || halves == 0) return 0;
    const int top = 31 - __clz(halves);
    const int exponent = top - 1 + index - 9;  // of the value: halves / 2 * 2^(index - 9)
    if (exponent < -6) return static_cast<uint8_t>(halves << (index - 1));  // in units of 2^-9
    return static_cast<uint8_t>((exponent + 7) << 3 | ((halves << 3 >> top) & 7));
  }

  // The magnitudes of a thread's two groups of 32: rows g and g + 8.
  struct Tables {
    uint2 low, high;
  };
  static __device__ __forceinline__ Tables LoadTables(uint32_t record, const RecordThread& thread,
                                                      uint32_t table) {
    const uint2 words = ScaleWords(record, thread);
    return {ptx::LoadShared64(table + (words.x >> thread.quarter & 0x78)),
            ptx::LoadShared64(table + (words.y >> thread.quarter & 0x78))};
  }

  static __device__ __forceinline__ void DecodePlane(uint4 codes, const Tables& tables,
                                                     Plane& plane) {
    DecodeE2m1(codes.x, tables.low, plane[0][0], plane[0][2]);
    DecodeE2m1(codes.y, tables.high, plane[0][1], plane[0][3]);
    DecodeE2m1(codes.z, tables.low, plane[1][0], plane[1][2]);
    DecodeE2m1(codes.w, tables.high, plane[1][1], plane[1][3]);
  }

  using Scales = float2;
  static __device__ __forceinline__ Scales LoadScales(uint32_t record, const RecordThread& thread) {
    const uint2 words = ScaleWords(record, thread);
    return {__uint_as_float(words.x & 0x7f800000u), __uint_as_float(words.y & 0x7f800000u)};
  }
  static __device__ __forceinline__ float Scale(const Scales& scales, int, int half) {
    return half ? scales.y : scales.x;
  }
};

}  // namespace jax_w4moe
