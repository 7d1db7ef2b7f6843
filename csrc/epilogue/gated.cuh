// h[row, j] = a gated activation of gate and up, in f32, rounded to bf16 (docs/numerics.md, R3).
//
// One thread holds gate j (row 16 w + g of the slab) and up j (row 16 w + g + 8).
#pragma once

#include <cmath>

#include "epilogue/activation.h"
#include "epilogue/tile.cuh"

namespace jax_w4moe {

// 1 / (1 + 2^x).
__device__ __forceinline__ float LogisticOfLog2(float x) {
  return ptx::Reciprocal(1.0f + ptx::Exp2(x));
}
inline constexpr float kLog2E = 1.44269504f;

struct SwiGlu {
  float log2_factor, beta, limit;
  bool clamps;

  __device__ __forceinline__ explicit SwiGlu(const Activation& a)
      : log2_factor(-a.parameters[0] * kLog2E),
        beta(a.parameters[1]),
        limit(a.parameters[2]),
        clamps(limit < INFINITY) {}
  __device__ __forceinline__ float operator()(float gate, float up) const {
    if (clamps) {
      gate = ptx::MinNan(gate, limit);
      up = ptx::MinNan(ptx::MaxNan(up, -limit), limit);
    }
    return gate * LogisticOfLog2(log2_factor * gate) * (up + beta);
  }
};

struct SiTu {
  float gate_bound, up_bound, inv_gate_bound, inv_up_bound;

  __device__ __forceinline__ explicit SiTu(const Activation& a)
      : gate_bound(a.parameters[0]),
        up_bound(a.parameters[1]),
        inv_gate_bound(1.0f / gate_bound),
        inv_up_bound(1.0f / up_bound) {}
  __device__ __forceinline__ float operator()(float gate, float up) const {
    return gate_bound * ptx::Tanh(gate * inv_gate_bound) * LogisticOfLog2(-kLog2E * gate) *
           (up_bound * ptx::Tanh(up * inv_up_bound));
  }
};

struct Gated {
  __nv_bfloat16* h;   // [M, width], width = 32 per slab: the padded intermediate size
  const float* bias;  // [E, slabs, 64] in the order of the records' rows, or null
  int slabs;
  Activation activation;

  static constexpr int kChunks = 4;  // of 16 bytes that a token has in a tile

  // Of a thread's gate and up.
  __device__ __forceinline__ float2 Biases(const EpilogueTile& tile) const {
    if (!bias) return {0.0f, 0.0f};
    const float* rows = bias + (int64_t{tile.expert} * slabs + tile.slab) * 64;
    return {rows[tile.Row(0)], rows[tile.Row(2)]};
  }
  template <typename Act>
  __device__ __forceinline__ void StoreOneToken(const float (&sums)[2], float2 biases, float scale,
                                                const EpilogueTile& tile, const Act& act) const {
    h[(tile.first_row * slabs + tile.slab) * 32 + tile.Row(0) / 16 * 8 + tile.Row(0) % 8] =
        __float2bfloat16_rn(act(sums[0] * scale + biases.x, sums[1] * scale + biases.y));
  }

  // act: of the two above.
  template <int kTokens, typename Act>
  __device__ __forceinline__ void Stage(float (&acc)[kTokens / 2], const EpilogueTile& tile,
                                        const Act& act) const {
    const float2 biases = Biases(tile);
#pragma unroll
    for (int i = 0; i < kTokens / 2; i += 4) {
      const float2 scales = tile.Scales(i);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float scale = j ? scales.y : scales.x;
        acc[i + j] = act(acc[i + j] * scale + biases.x, acc[i + j + 2] * scale + biases.y);
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
