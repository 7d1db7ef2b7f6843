// h[row, j] = SwiGLU of gate and up, in f32, rounded to bf16 (docs/numerics.md, R3).
//
// One thread holds gate j (row 16 w + g of the slab) and up j (row 16 w + g + 8).
#pragma once

#include "epilogue/tile.cuh"

namespace jax_w4moe {

struct SwiGlu {
  __nv_bfloat16* h;   // [M, width], width = 32 per slab: the padded intermediate size
  const float* bias;  // [E, slabs, 64] in the order of the records' rows, or null
  int slabs;
  float alpha, beta, limit;  // limit is infinite for no clamp

  template <int kTokens>
  __device__ __forceinline__ void Store(float (&acc)[kTokens / 2], const EpilogueTile& tile) const {
    float gate_bias = 0.0f, up_bias = 0.0f;
    if (bias) {
      const float* rows = bias + (int64_t{tile.expert} * slabs + tile.slab) * 64;
      gate_bias = rows[tile.Row(0)];
      up_bias = rows[tile.Row(2)];
    }
#pragma unroll
    for (int i = 0; i < kTokens / 2; i += 4) {
      const float2 scales = tile.Scales(i);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float scale = j ? scales.y : scales.x;
        const float gate = ptx::MinNan(acc[i + j] * scale + gate_bias, limit);
        const float up = ptx::MinNan(ptx::MaxNan(acc[i + j + 2] * scale + up_bias, -limit), limit);
        const float silu = __fdividef(gate, 1.0f + __expf(-alpha * gate));
        acc[i + j] = silu * (up + beta);
      }
    }
    StoreTransposed<kTokens, 1>(
        tile, [&](int group, int) { return PackBf16(acc[group * 4], acc[group * 4 + 1]); },
        [&](int token, int octet, uint4 value) {
          const int64_t at = (tile.first_row + token) * slabs + tile.slab;
          *reinterpret_cast<uint4*>(h + at * 32 + octet * 8) = value;
        });
  }
};

}  // namespace jax_w4moe
