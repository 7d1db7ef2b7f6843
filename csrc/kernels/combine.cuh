// y[t] = sum over slots s, in order, of topk_weights[t, s] * slot row (docs/numerics.md, R6).
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "common/convert.cuh"
#include "ptx/sm90.cuh"
#include "schedule/rows.cuh"

namespace jax_w4moe {

inline constexpr int kCombineThreads = 128;
inline constexpr int kCombineColumns = 8;  // of a thread: 16 bytes
inline constexpr int kCombineAhead = 8;    // slot rows in flight

// Where the slots of pairs lie: as a table says, or those of one token in their own order.
struct PlacesOfTable {
  const Place* table;
  __device__ __forceinline__ Place At(int64_t pair) const { return table[pair]; }
};
struct PlacesOfOneToken {
  const int* expert_ids;
  int num_experts;
  __device__ __forceinline__ Place At(int64_t pair) const {
    const int id = expert_ids[pair];
    return {static_cast<int>(pair), id >= 0 && id < num_experts ? 0 : -1};
  }
};

// One block per token and kCombineThreads * kCombineColumns columns; hidden_size is a multiple of
// 32. A slot without an expert adds nothing, whatever its weight.
template <typename Places>
__global__ void __launch_bounds__(kCombineThreads)
    CombineSlots(const __nv_bfloat16* slots, Places places, const float* __restrict__ topk_weights,
                 int top_k, int hidden_size, __nv_bfloat16* __restrict__ y) {
  const int64_t token = blockIdx.x;
  const int column = (blockIdx.y * kCombineThreads + threadIdx.x) * kCombineColumns;
  int rows[kCombineAhead];  // or -1
  float weights[kCombineAhead];
  auto look_up = [&](int first) {
#pragma unroll
    for (int i = 0; i < kCombineAhead; ++i) {
      const int64_t pair = token * top_k + first + i;
      const bool is_there = first + i < top_k;
      const Place place = is_there ? places.At(pair) : Place{0, -1};
      rows[i] = place.phase >= 0 ? place.row : -1;
      weights[i] = is_there ? topk_weights[pair] : 0.0f;
    }
  };
  look_up(0);  // complete before the kernel that writes the slots let this one start
  ptx::WaitForPrecedingKernels();
  if (column >= hidden_size) return;
  float sum[kCombineColumns] = {};
  for (int first = 0;;) {
    uint4 values[kCombineAhead];
#pragma unroll
    for (int i = 0; i < kCombineAhead; ++i) {
      if (rows[i] < 0) continue;
      values[i] = *reinterpret_cast<const uint4*>(slots + int64_t{rows[i]} * hidden_size + column);
    }
#pragma unroll
    for (int i = 0; i < kCombineAhead; ++i) {
      if (rows[i] < 0) continue;
      const uint32_t words[4] = {values[i].x, values[i].y, values[i].z, values[i].w};
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        // Rounded twice, as XLA does it where slots are combined after an exchange.
        const float low = __fmul_rn(weights[i], LowBf16ToFloat(words[w]));
        const float high = __fmul_rn(weights[i], HighBf16ToFloat(words[w]));
        sum[2 * w] = __fadd_rn(sum[2 * w], low);
        sum[2 * w + 1] = __fadd_rn(sum[2 * w + 1], high);
      }
    }
    first += kCombineAhead;
    if (first >= top_k) break;
    look_up(first);
  }
  *reinterpret_cast<uint4*>(y + token * hidden_size + column) =
      make_uint4(PackBf16(sum[0], sum[1]), PackBf16(sum[2], sum[3]), PackBf16(sum[4], sum[5]),
                 PackBf16(sum[6], sum[7]));
}

}  // namespace jax_w4moe
