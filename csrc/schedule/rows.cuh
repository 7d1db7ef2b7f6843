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

// E4M3 rows as the shared-memory image that WGMMA reads: [K/128][rows][128 B], the 128-byte swizzle
// by phase, K permuted as in the weights (docs/layout.md). A tile of tokens is one contiguous copy
// per K-block.
struct TokenImage {
  uint8_t* data;     // [k_blocks][num_rows][128]
  float* row_scale;  // [num_rows]
  int64_t num_rows;

#ifdef __CUDACC__
  // Chunk 8 b + part of a row is 16 bytes: instruction part / 2, half part % 2 of K-block b, that
  // is k = 128 b + 32 t + 4 part + byte for t = 0..3.
  __device__ __forceinline__ void Write(Place place, int chunk, uint4 value) const {
    const int64_t line = int64_t{chunk / 8} * num_rows + place.row;
    *reinterpret_cast<uint4*>(data + line * 128 + ((chunk % 8) ^ place.phase) * 16) = value;
  }
#endif
};

}  // namespace jax_w4moe
