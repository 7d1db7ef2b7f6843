// Rows of tokens in the order of their experts, and their image.
#pragma once

#include <cstdint>

namespace jax_w4moe {

// Where a (token, slot) pair's row lies; `phase` is its number within the expert modulo 8, by which
// the image is swizzled, or -1 for no expert.
struct Place {
  int row;
  int phase;
};

// A row's expert and its phase as one number, or kNoExpert.
inline constexpr int kNoExpert = -1;
#ifdef __CUDACC__
__device__ __forceinline__ int RowTag(int expert, int phase) {
  return phase < 0 ? kNoExpert : expert * 8 + phase;
}
__device__ __forceinline__ int TagExpert(int tag) { return tag / 8; }
__device__ __forceinline__ int TagPhase(int tag) { return tag % 8; }
#endif

// Rows as the shared-memory image that WGMMA reads: [K/128][panels][rows][128 B], one panel of E4M3
// or two of bf16, the 128-byte swizzle by phase, K permuted as in the weights (docs/layout.md). A
// panel of a tile of tokens is one contiguous copy.
struct TokenImage {
  uint8_t* data;     // [k_blocks][panels][num_rows][128]
  float* row_scale;  // [num_rows]
  int64_t num_rows;

#ifdef __CUDACC__
  // Chunk 8 b + part of a row is instruction part / 2, half part % 2 of K-block b, that is
  // k = 128 b + 32 t + 4 part + i for t, i = 0..3: 16 bytes for each panel.
  __device__ __forceinline__ void Write(Place place, int chunk, uint4 value) const {
    WriteUnit(place, chunk / 8, chunk % 8, value);
  }
  __device__ __forceinline__ void Write(Place place, int chunk, const uint4 (&values)[2]) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) WriteUnit(place, chunk / 8 * 2 + i, chunk % 8, values[i]);
  }

 private:
  __device__ __forceinline__ void WriteUnit(Place place, int panel, int unit, uint4 value) const {
    const int64_t line = int64_t{panel} * num_rows + place.row;
    *reinterpret_cast<uint4*>(data + line * 128 + (unit ^ place.phase) * 16) = value;
  }
#endif
};

}  // namespace jax_w4moe
