// Where a record has what a thread of the warpgroup needs, whatever the format (docs/layout.md).
#pragma once

#include <cstdint>

#include "ptx/sm90.cuh"

namespace jax_w4moe {

// Four words of eight codes: rows g and g + 8 of the plane's first instruction, then of its second.
template <int kPlane>
__device__ __forceinline__ uint4 Codes(uint32_t record, int thread) {
  return ptx::LoadShared128(record + kPlane * 2048 + thread * 16);
}

// The scale words of rows g and g + 8.
__device__ __forceinline__ uint2 ScaleWords(uint32_t record, int thread) {
  const int pair = thread / 32 * 8 + thread % 32 / 4;
  return ptx::LoadShared64(record + 4096 + pair * 8);
}

}  // namespace jax_w4moe
