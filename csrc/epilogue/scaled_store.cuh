// out[row, column] = acc * x_scale[row] + bias[expert, column], columns in canonical order.
#pragma once

#include "epilogue/tile.cuh"

namespace jax_w4moe {

template <typename Out>
struct ScaledStore {
  Out* out;              // [M, num_columns]
  const float* x_scale;  // [M]
  const float* bias;     // [E, num_columns], or null
  int num_columns;       // logical rows of the weights
  bool gate_up;          // rows of records interleave gate and up (docs/layout.md, "Rows")

  template <int kTokens>
  __device__ __forceinline__ void Store(const float (&acc)[kTokens / 2],
                                        const EpilogueTile& tile) const {
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) {
      tile.staging[tile.Token(i) * kStagingRow + tile.Row(i)] = acc[i];
    }
    tile.Sync();
    const int row = tile.thread % 64, column = Column(tile.slab, row);
    if (column < num_columns) {
      const float shift = bias ? bias[int64_t{tile.expert} * num_columns + column] : 0.0f;
      for (int token = tile.thread / 64; token < tile.live; token += 2) {
        const float value = tile.staging[token * kStagingRow + row];
        const int64_t at = tile.first_row + token;
        out[at * num_columns + column] = FromFloat<Out>(value * x_scale[at] + shift);
      }
    }
    tile.Sync();  // the staging is free again
  }

 private:
  // The canonical column of a slab's row; num_columns or more for padding.
  __device__ __forceinline__ int Column(int slab, int row) const {
    if (!gate_up) return slab * 64 + row;
    const int half = row / 8 % 2, in_half = slab * 32 + row / 16 * 8 + row % 8;
    return in_half < num_columns / 2 ? half * (num_columns / 2) + in_half : num_columns;
  }
};

}  // namespace jax_w4moe
