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

}  // namespace jax_w4moe
