// The compiled tiles of the grouped GEMM, and what the ops built on it share.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>

#include "kernels/grouped_gemm.cuh"
#include "launch/tiles.h"

namespace jax_w4moe {

// Every compiled tile: tokens, math warpgroups, stages.
#define JAX_W4MOE_TILES(X) X(8, 3, 12) X(16, 3, 11) X(32, 3, 9) X(64, 3, 7) X(128, 2, 6)

inline constexpr int kMaxTileTokens = 128;

inline int TileWarpgroups(int64_t tile_tokens) {
#define JAX_W4MOE_CASE(tokens, warpgroups, stages) \
  if (tile_tokens == tokens) return warpgroups;
  JAX_W4MOE_TILES(JAX_W4MOE_CASE)
#undef JAX_W4MOE_CASE
  return 0;
}

// Atoms of a token image for `num_rows` rows, every expert's padded to whole ones; the last tile
// may read beyond the last expert's.
inline int64_t NumAtoms(int64_t num_rows, int64_t num_experts) {
  const int64_t padding = std::min(num_rows, num_experts) * (kTokenAtom - 1);
  return (num_rows + padding + kTokenAtom - 1) / kTokenAtom + kMaxTileTokens / kTokenAtom;
}

inline cudaError_t NumSms(int* num_sms) {
  int device = 0;
  const cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  return cudaDeviceGetAttribute(num_sms, cudaDevAttrMultiProcessorCount, device);
}

// Raises the shared-memory limit of every tile with this epilogue on the current device.
template <typename Epilogue>
cudaError_t PrepareGroupedGemm() {
  cudaError_t status = cudaSuccess;
#define JAX_W4MOE_CASE(tokens, warpgroups, stages)                                            \
  if (status == cudaSuccess) {                                                                \
    status = cudaFuncSetAttribute(GroupedGemm<tokens, warpgroups, stages, Epilogue>,          \
                                  cudaFuncAttributeMaxDynamicSharedMemorySize,                \
                                  GroupedGemmTile<tokens, warpgroups, stages>::kSharedBytes); \
  }
  JAX_W4MOE_TILES(JAX_W4MOE_CASE)
#undef JAX_W4MOE_CASE
  return status;
}

template <typename Epilogue>
void LaunchGroupedGemm(int64_t tile_tokens, const GroupedGemmParams& p, const Epilogue& epilogue,
                       int num_sms, cudaStream_t stream) {
#define JAX_W4MOE_CASE(tokens, warpgroups, stages)                              \
  if (tile_tokens == tokens) {                                                  \
    using Tile = GroupedGemmTile<tokens, warpgroups, stages>;                   \
    GroupedGemm<tokens, warpgroups, stages, Epilogue>                           \
        <<<num_sms, Tile::kThreads, Tile::kSharedBytes, stream>>>(p, epilogue); \
  }
  JAX_W4MOE_TILES(JAX_W4MOE_CASE)
#undef JAX_W4MOE_CASE
}

}  // namespace jax_w4moe
