// The definitions of grouped_gemm.h, for the files that compile a format with an epilogue each.
#pragma once

#include "kernels/grouped_gemm.cuh"
#include "launch/grouped_gemm.h"
#include "launch/grouped_gemm_tiles.h"
#include "launch/launch.h"

namespace jax_w4moe {

template <typename Format, typename Epilogue>
cudaError_t PrepareTiles() {
  cudaError_t status = cudaSuccess;
#define JAX_W4MOE_CASE(...)                                                                    \
  if (status == cudaSuccess) {                                                                 \
    using Tile = GroupedGemmTile<Format, __VA_ARGS__>;                                         \
    status =                                                                                   \
        cudaFuncSetAttribute(GroupedGemm<Tile, Epilogue>,                                      \
                             cudaFuncAttributeMaxDynamicSharedMemorySize, Tile::kSharedBytes); \
  }
  JAX_W4MOE_TILES(JAX_W4MOE_CASE)
#undef JAX_W4MOE_CASE
  return status;
}

template <typename Format, typename Epilogue>
void LaunchTile(int64_t tile_tokens, const GroupedGemmParams& params, const Epilogue& epilogue,
                int num_sms, cudaStream_t stream) {
#define JAX_W4MOE_CASE(...)                                                                   \
  if (tile_tokens == GroupedGemmTile<Format, __VA_ARGS__>::kTokens) {                         \
    using Tile = GroupedGemmTile<Format, __VA_ARGS__>;                                        \
    LaunchDependent(GroupedGemm<Tile, Epilogue>, num_sms, Tile::kThreads, Tile::kSharedBytes, \
                    stream, params, epilogue);                                                \
  }
  JAX_W4MOE_TILES(JAX_W4MOE_CASE)
#undef JAX_W4MOE_CASE
}

#define JAX_W4MOE_COMPILE(Format, Epilogue)                                                      \
  template cudaError_t PrepareTiles<Format, Epilogue>();                                         \
  template void LaunchTile<Format, Epilogue>(int64_t, const GroupedGemmParams&, const Epilogue&, \
                                             int, cudaStream_t);

}  // namespace jax_w4moe
