// Where a record has what a thread of the warpgroup needs, whatever the format (docs/layout.md).
#pragma once

#include <cstdint>

#include "common/limits.h"
#include "ptx/sm90.cuh"

namespace jax_w4moe {

// Four words of eight codes: rows g and g + 8 of the plane's first instruction, then of its second.
template <int kPlane>
__device__ __forceinline__ uint4 Codes(uint32_t record, int thread) {
  return ptx::LoadShared128(record + kPlane * (kCodeBytes / 2) + thread * 16);
}

// Rows g and g + 8 of a warp, whose scale words are neighbours.
__device__ __forceinline__ int RowPair(int thread) { return thread / 32 * 8 + thread % 32 / 4; }

// The scale word of each, where a row has one.
__device__ __forceinline__ uint2 ScaleWords(uint32_t record, int thread) {
  return ptx::LoadShared64(record + kCodeBytes + RowPair(thread) * 8);
}

// Two words of row g, then of row g + 8.
__device__ __forceinline__ uint4 ScaleWordPairs(uint32_t record, int thread) {
  return ptx::LoadShared128(record + kCodeBytes + RowPair(thread) * 16);
}

// Of a decoder (formats/mxfp4.cuh) without a table: Decoder::Decode makes eight codes two registers
// of four E4M3.
template <typename Decoder>
struct CodesWithoutTable {
  static constexpr int kTableBytes = 0;  // none
  static __device__ __forceinline__ uint8_t TableByte(int) { return 0; }

  struct Tables {};
  static __device__ __forceinline__ Tables LoadTables(uint32_t, int, uint32_t) { return {}; }

  template <int kPlane>
  static __device__ __forceinline__ void DecodePlane(uint4 codes, const Tables&,
                                                     uint32_t (&a)[4][4]) {
    Decoder::Decode(codes.x, a[2 * kPlane][0], a[2 * kPlane][2]);
    Decoder::Decode(codes.y, a[2 * kPlane][1], a[2 * kPlane][3]);
    Decoder::Decode(codes.z, a[2 * kPlane + 1][0], a[2 * kPlane + 1][2]);
    Decoder::Decode(codes.w, a[2 * kPlane + 1][1], a[2 * kPlane + 1][3]);
  }
};

}  // namespace jax_w4moe
