// Packed records, and where one has what a thread of the warpgroup needs, whatever the format
// (docs/layout.md).
#pragma once

#include <cstdint>

#include "common/limits.h"
#include "ptx/sm90.cuh"

namespace jax_w4moe {

// Packed weights of all experts: [E, row_blocks, k_blocks] records.
struct Records {
  const uint8_t* data;
  int row_blocks;
  int k_blocks;

  __device__ __forceinline__ const uint8_t* Slab(int expert, int slab, int record_bytes) const {
    return data + (int64_t{expert} * row_blocks + slab) * (int64_t{k_blocks} * record_bytes);
  }
};

// Where a thread of the warpgroup finds what it needs in any record: offsets in bytes.
struct RecordThread {
  uint32_t codes;    // of its part of a plane
  uint32_t scales;   // where a row has one scale word: of rows g and g + 8 of a warp, neighbours
  uint32_t quarter;  // of K128, which its codes are of: the bits of a word with four for each

  // keeps: in registers of their own, so that they are added to an address as they are; else the
  // compiler shifts the thread's index each time.
  __device__ __forceinline__ RecordThread(int thread, bool keeps)
      : codes(thread * 16), scales(thread / 4 * 8), quarter(thread % 4 * 4) {
    if (keeps) {
      codes = ptx::Opaque(codes);
      scales = ptx::Opaque(scales);
    }
  }
};

// A fragments of two WGMMAs: half of a record.
using Plane = uint32_t[2][4];

// Four words of eight codes: rows g and g + 8 of the plane's first instruction, then of its second.
template <int kPlane>
__device__ __forceinline__ uint4 Codes(uint32_t record, const RecordThread& thread) {
  return ptx::LoadShared128(record + thread.codes + kPlane * (kCodeBytes / 2));
}

// The scale words of rows g and g + 8, where a row has one.
__device__ __forceinline__ uint2 ScaleWords(uint32_t record, const RecordThread& thread) {
  return ptx::LoadShared64(record + thread.scales + kCodeBytes);
}

// Two words of row g, then of row g + 8.
__device__ __forceinline__ uint4 ScaleWordPairs(uint32_t record, const RecordThread& thread) {
  return ptx::LoadShared128(record + thread.scales * 2 + kCodeBytes);
}

// A decoder's table, if it has one, by the first threads of a block.
template <typename Decoder>
__device__ __forceinline__ void WriteTable(uint8_t* to) {
  if constexpr (Decoder::kTableBytes > 0) {
    if (threadIdx.x < Decoder::kTableBytes) to[threadIdx.x] = Decoder::TableByte(threadIdx.x);
  }
}

// Of a decoder (formats/mxfp4.cuh) without a table: Decoder::Decode makes eight codes two registers
// of four E4M3.
template <typename Decoder>
struct CodesWithoutTable {
  static constexpr int kTableBytes = 0;  // none
  static __device__ __forceinline__ uint8_t TableByte(int) { return 0; }

  struct Tables {};
  static __device__ __forceinline__ Tables LoadTables(uint32_t, const RecordThread&, uint32_t) {
    return {};
  }

  static __device__ __forceinline__ void DecodePlane(uint4 codes, const Tables&, Plane& plane) {
    Decoder::Decode(codes.x, plane[0][0], plane[0][2]);
    Decoder::Decode(codes.y, plane[0][1], plane[0][3]);
    Decoder::Decode(codes.z, plane[1][0], plane[1][2]);
    Decoder::Decode(codes.w, plane[1][1], plane[1][3]);
  }
};

}  // namespace jax_w4moe
