// out[row, column] = acc * row_scale[row] + bias[expert, column], columns in canonical order.
#pragma once

#include "epilogue/tile.cuh"

namespace jax_w4moe {

struct ScaledStore {
  void* out;          // [M, num_columns], of bf16 where it is staged, else f32
  const float* bias;  // [E, num_columns], or null
  int num_columns;    // logical rows of the weights, a multiple of 32
  bool gate_up;       // rows of records interleave gate and up (docs/layout.md, "Rows")

  static constexpr int kChunks = 8;  // of 16 bytes that a token has in a tile of bf16

  // Of a thread's rows g and g + 8.
  __device__ __forceinline__ float2 Biases(const EpilogueTile& tile) const {
    float shift[2] = {0.0f, 0.0f};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int column = Column(tile, half);
      if (bias && column < num_columns) {
        shift[half] = bias[int64_t{tile.expert} * num_columns + column];
      }
    }
    return {shift[0], shift[1]};
  }
  __device__ __forceinline__ void StoreOneToken(const float (&sums)[2], float2 biases, float scale,
                                                const EpilogueTile& tile) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int column = Column(tile, half);
      if (column >= num_columns) continue;
      static_cast<__nv_bfloat16*>(out)[tile.first_row * num_columns + column] =
          __float2bfloat16_rn(sums[half] * scale + (half ? biases.y : biases.x));
    }
  }

  // bf16: to shared memory.
  template <int kTokens>
  __device__ __forceinline__ void Stage(float (&acc)[kTokens / 2], const EpilogueTile& tile) const {
    Scale<kTokens>(acc, tile);
    StageTransposed<kTokens, 2>(tile, [&](int group, int octet) {
      return PackBf16(acc[group * 4 + octet * 2], acc[group * 4 + octet * 2 + 1]);
    });
  }
  __device__ __forceinline__ StoreTarget Target(int64_t row, int slab, int chunk) const {
    const int column = Octet(slab, chunk);
    uint8_t* to = static_cast<uint8_t*>(out) + (row * num_columns + column) * 2;
    return {column < num_columns ? to : nullptr, num_columns * 2};
  }

  // f32: from registers; eight lanes write 32 bytes of a token.
  template <int kTokens>
  __device__ __forceinline__ void Store(float (&acc)[kTokens / 2], const EpilogueTile& tile) const {
    Scale<kTokens>(acc, tile);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int column = Column(tile, half);
      if (column >= num_columns) continue;
      float* to =
          static_cast<float*>(out) + (tile.first_row + tile.Token(0)) * num_columns + column;
      const int live = tile.live - tile.Token(0);
#pragma unroll
      for (int i = 0; i < kTokens / 2; i += 4) {
        if (i * 2 < live) to[0] = acc[i + 2 * half];
        if (i * 2 + 1 < live) to[num_columns] = acc[i + 2 * half + 1];
        to += 8 * num_columns;
      }
    }
  }

 private:
  template <int kTokens>
  __device__ __forceinline__ void Scale(float (&acc)[kTokens / 2], const EpilogueTile& tile) const {
    const float2 shift = Biases(tile);
#pragma unroll
    for (int i = 0; i < kTokens / 2; i += 4) {
      const float2 scale = tile.Scales(i);
      acc[i] = acc[i] * scale.x + shift.x;
      acc[i + 1] = acc[i + 1] * scale.y + shift.x;
      acc[i + 2] = acc[i + 2] * scale.x + shift.y;
      acc[i + 3] = acc[i + 3] * scale.y + shift.y;
    }
  }

  // The canonical column of a thread's row g (half 0) or g + 8 (half 1).
  __device__ __forceinline__ int Column(const EpilogueTile& tile, int half) const {
    return Octet(tile.slab, tile.Row(2 * half) / 8) + tile.Row(0) % 8;
  }
  // The canonical column of the first of 8 rows of a slab; num_columns or more for padding.
  __device__ __forceinline__ int Octet(int slab, int octet) const {
    if (!gate_up) return slab * 64 + octet * 8;
    const int half = octet % 2, in_half = slab * 32 + octet / 2 * 8;
    return in_half < num_columns / 2 ? half * (num_columns / 2) + in_half : num_columns;
  }
};

}  // namespace jax_w4moe
