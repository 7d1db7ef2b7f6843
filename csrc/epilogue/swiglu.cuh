// h[row, j] = SwiGLU of gate and up, in f32, rounded to bf16 (docs/numerics.md, R3).
//
// One thread holds gate j (row 16 w + g of the slab) and up j (row 16 w + g + 8).
#pragma once

#include <cmath>

#include "epilogue/tile.cuh"

namespace jax_w4moe {

struct SwiGlu {
  __nv_bfloat16* h;   // [M, width], width = 32 per slab: the padded intermediate size
  const float* bias;  // [E, slabs, 64] in the order of the records' rows, or null
  int slabs;
  float alpha, beta, limit;  // limit is infinite for no clamp

  static constexpr int kChunks = 4;  // of 16 bytes that a token has in a tile

  template <int kTokens>
  __device__ __forceinline__ void Stage(float (&acc)[kTokens / 2], const EpilogueTile& tile) const {
    float gate_bias = 0.0f, up_bias = 0.0f;
    if (bias) {
      const float* rows = bias + (int64_t{tile.expert} * slabs + tile.slab) * 64;
      gate_bias = rows[tile.Row(0)];
      up_bias = rows[tile.Row(2)];
    }
    const bool clamps = limit < INFINITY;
    const float log2_factor = -alpha * 1.44269504f;
#pragma unroll
    for (int i = 0; i < kTokens / 2; i += 4) {
      const float2 scales = tile.Scales(i);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float scale = j ? scales.y : scales.x;
        float gate = acc[i + j] * scale + gate_bias, up = acc[i + j + 2] * scale + up_bias;
        if (clamps) {
          gate = ptx::MinNan(gate, limit);
          up = ptx::MinNan(ptx::MaxNan(up, -limit), limit);
        }
        const float sigmoid = ptx::Reciprocal(1.0f + ptx::Exp2(log2_factor * gate));
        acc[i + j] = gate * sigmoid * (up + beta);
      }
    }
    StageTransposed<kTokens, 1>(
        tile, [&](int group, int) { return PackBf16(acc[group * 4], acc[group * 4 + 1]); });
  }

  __device__ __forceinline__ StoreTarget Target(int64_t row, int slab, int chunk) const {
    return {reinterpret_cast<uint8_t*>(h + (row * slabs + slab) * 32 + chunk * 8), slabs * 64};
  }
};

}  // namespace jax_w4moe
