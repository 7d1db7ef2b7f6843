// h[row, j] = SwiGLU of gate and up, in f32, rounded to bf16 (docs/numerics.md, R3), and the row's
// largest |h| before that rounding, as an integer maximum of f32 bits: the order of tiles and the
// number of tokens do not matter.
//
// One thread holds gate j (row 16 w + g of the slab) and up j (row 16 w + g + 8).
#pragma once

#include "epilogue/tile.cuh"

namespace jax_w4moe {

struct SwiGlu {
  __nv_bfloat16* h;      // [M, width], width = 32 per slab: the padded intermediate size
  uint32_t* amax_bits;   // [M], zero before
  const float* x_scale;  // [M]
  const float* bias;     // [E, slabs, 64] in the order of the records' rows, or null
  int slabs;
  float alpha, beta, limit;  // limit is infinite for no clamp

  template <int kTokens>
  __device__ __forceinline__ void Store(const float (&acc)[kTokens / 2],
                                        const EpilogueTile& tile) const {
    float gate_bias = 0.0f, up_bias = 0.0f;
    if (bias) {
      const float* rows = bias + (int64_t{tile.expert} * slabs + tile.slab) * 64;
      gate_bias = rows[tile.Row(0)];
      up_bias = rows[tile.Row(2)];
    }
    const int j = tile.thread / 32 * 8 + tile.thread % 32 / 4;
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) {
      if (i / 2 % 2) continue;  // the up of i - 2
      const int token = tile.Token(i);
      const float scale = token < tile.live ? x_scale[tile.first_row + token] : 0.0f;
      const float gate = ptx::MinNan(acc[i] * scale + gate_bias, limit);
      const float up = ptx::MinNan(ptx::MaxNan(acc[i + 2] * scale + up_bias, -limit), limit);
      const float silu = gate / (1.0f + __expf(-alpha * gate));
      tile.staging[token * kStagingRow + j] = silu * (up + beta);
    }
    tile.Sync();
    const int64_t width = int64_t{slabs} * 32;
    const int column = tile.thread % 32;
    for (int token = tile.thread / 32; token < tile.live; token += 4) {  // a warp per token
      const float value = tile.staging[token * kStagingRow + column];
      const int64_t row = tile.first_row + token;
      h[row * width + tile.slab * 32 + column] = __float2bfloat16_rn(value);
      const uint32_t largest = __reduce_max_sync(~0u, __float_as_uint(value) & 0x7fffffffu);
      if (column == 0) atomicMax(amax_bits + row, largest);
    }
    tile.Sync();
  }
};

}  // namespace jax_w4moe
