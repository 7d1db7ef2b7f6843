// The table of compiled tiles of the grouped GEMM; jax_w4moe/ops/tiles.py has the same.
#pragma once

#include <cstdint>

#include "formats/formats.h"

namespace jax_w4moe {

// Token sub-tiles, tokens of each at most, math warpgroups, stages; and the least and the most
// groups of K (formats/formats.h) of the formats that have the tile: more sums take registers.
#define JAX_W4MOE_FP8_TILES(X) \
  X(1, 64, 3, 9, 1, 8)         \
  X(1, 96, 3, 7, 1, 8)         \
  X(1, 120, 3, 6, 1, 1)        \
  X(2, 80, 3, 4, 1, 1)         \
  X(2, 120, 2, 4, 1, 4)        \
  X(3, 96, 2, 3, 1, 4)
#define JAX_W4MOE_BF16_TILES(X) \
  X(1, 32, 3, 9, 1, 8)          \
  X(1, 64, 3, 6, 1, 8)          \
  X(1, 96, 3, 5, 1, 8)          \
  X(1, 120, 3, 4, 1, 1)         \
  X(2, 80, 3, 3, 1, 1)          \
  X(2, 96, 2, 3, 4, 8)          \
  X(2, 112, 2, 3, 1, 1)

// Whether a tile of that many tokens is compiled.
inline bool HasTile(int64_t tile_tokens, Operands operands) {
  const int groups = operands.Groups();
#define JAX_W4MOE_CASE(subtiles, width, warpgroups, stages, least, most) \
  || (tile_tokens == subtiles * width && groups >= least && groups <= most)
  return operands.is_bf16 ? false JAX_W4MOE_BF16_TILES(JAX_W4MOE_CASE)
                          : false JAX_W4MOE_FP8_TILES(JAX_W4MOE_CASE);
#undef JAX_W4MOE_CASE
}

}  // namespace jax_w4moe
