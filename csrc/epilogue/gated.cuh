// h[row, j] = a gated activation of gate and up, in f32, rounded to bf16 (docs/numerics.md, R3).
//
// One thread holds gate j (row 16 w + g of the slab) and up j (row 16 w + g + 8).
#pragma once

#include <cmath>

#include "epilogue/activation.h"
#include "epilogue/tile.cuh"

namespace jax_w4moe {

struct Gated {
  __nv_bfloat16* h;   // [M, width], width = 32 per slab: the padded intermediate size
  const float* bias;  // [E, slabs, 64] in the order of the records' rows, or null
  int slabs;
  Activation activation;

  static constexpr int kChunks = 4;  // of 16 bytes that a token has in a tile

  template <int kTokens>
  __device__ __forceinline__ void Stage(float (&acc)[kTokens / 2], const EpilogueTile& tile) const {
    float gate_bias = 0.0f, up_bias = 0.0f;
    if (bias) {
      const float* rows = bias + (int64_t{tile.expert} * slabs + tile.slab) * 64;
      gate_bias = rows[tile.Row(0)];
      up_bias = rows[tile.Row(2)];
    }
    const float (&p)[3] = activation.parameters;
    if (activation.kind == ActivationKind::kSwiGlu) {
      const float log2_factor = -p[0] * 1.44269504f, beta = p[1], limit = p[2];
      const bool clamps = limit < INFINITY;
      Apply<kTokens>(acc, tile, gate_bias, up_bias, [&](float gate, float up) {
        if (clamps) {
          gate = ptx::MinNan(gate, limit);
          up = ptx::MinNan(ptx::MaxNan(up, -limit), limit);
        }
        return gate * Sigmoid(log2_factor * gate) * (up + beta);
      });
    } else {
      const float gate_bound = p[0], up_bound = p[1];
      const float inv_gate_bound = 1.0f / gate_bound, inv_up_bound = 1.0f / up_bound;
      Apply<kTokens>(acc, tile, gate_bias, up_bias, [&](float gate, float up) {
        return gate_bound * ptx::Tanh(gate * inv_gate_bound) * Sigmoid(-1.44269504f * gate) *
               (up_bound * ptx::Tanh(up * inv_up_bound));
      });
    }
    StageTransposed<kTokens, 1>(
        tile, [&](int group, int) { return PackBf16(acc[group * 4], acc[group * 4 + 1]); });
  }

  __device__ __forceinline__ StoreTarget Target(int64_t row, int slab, int chunk) const {
    return {reinterpret_cast<uint8_t*>(h + (row * slabs + slab) * 32 + chunk * 8), slabs * 64};
  }

 private:
  // h in place of gate.
  template <int kTokens, typename F>
  static __device__ __forceinline__ void Apply(float (&acc)[kTokens / 2], const EpilogueTile& tile,
                                               float gate_bias, float up_bias, const F& gated) {
#pragma unroll
    for (int i = 0; i < kTokens / 2; i += 4) {
      const float2 scales = tile.Scales(i);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float scale = j ? scales.y : scales.x;
        acc[i + j] = gated(acc[i + j] * scale + gate_bias, acc[i + j + 2] * scale + up_bias);
      }
    }
  }
  // 1 / (1 + 2^x).
  static __device__ __forceinline__ float Sigmoid(float x) {
    return ptx::Reciprocal(1.0f + ptx::Exp2(x));
  }
};

}  // namespace jax_w4moe
