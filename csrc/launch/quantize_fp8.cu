// Launcher of quantize_fp8: picks the path and the grid from the shapes and the alignment.
#include <algorithm>
#include <cstdint>

#include "kernels/quantize_fp8.cuh"
#include "launch/quantize_fp8.h"

namespace jax_w4moe {
namespace {

bool IsAligned(const void* pointer, uintptr_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

// The kernels stride over the grid, so a grid cut off at CUDA's limit is still correct.
unsigned GridFor(int64_t num_tokens, int rows_per_block) {
  constexpr int64_t kMaxGrid = INT32_MAX;
  const int64_t blocks = (num_tokens + rows_per_block - 1) / rows_per_block;
  return static_cast<unsigned>(std::min(blocks, kMaxGrid));
}

template <int kTeam>
void LaunchVector(const QuantizeFp8Params& p, cudaStream_t stream) {
  const unsigned grid = GridFor(p.num_tokens, kQuantizeThreads / kTeam);
  QuantizeFp8Vector<kTeam><<<grid, kQuantizeThreads, 0, stream>>>(
      static_cast<const uint4*>(p.x), static_cast<uint2*>(p.x_fp8), p.x_scale, p.num_tokens,
      p.hidden_size / kVectorElements);
}

}  // namespace

cudaError_t LaunchQuantizeFp8(const QuantizeFp8Params& p, cudaStream_t stream) {
  if (p.num_tokens == 0) return cudaSuccess;
  const bool vector = p.hidden_size % kVectorElements == 0 && IsAligned(p.x, sizeof(uint4)) &&
                      IsAligned(p.x_fp8, sizeof(uint2));
  if (!vector) {
    QuantizeFp8Scalar<<<GridFor(p.num_tokens, 1), kQuantizeThreads, 0, stream>>>(
        static_cast<const uint16_t*>(p.x), static_cast<uint8_t*>(p.x_fp8), p.x_scale, p.num_tokens,
        p.hidden_size);
  } else if (p.hidden_size <= 32 * kKeptVectors * kVectorElements) {
    LaunchVector<32>(p, stream);  // a warp holds the row: no block barrier
  } else {
    LaunchVector<kQuantizeThreads>(p, stream);
  }
  return cudaGetLastError();
}

}  // namespace jax_w4moe
