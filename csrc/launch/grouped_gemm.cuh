// The definitions of grouped_gemm.h, for the files that compile one epilogue each.
#pragma once

#include "launch/grouped_gemm.h"
#include "launch/grouped_gemm_tiles.h"
#include "launch/launch.h"

namespace jax_w4moe {

template <typename Epilogue>
cudaError_t PrepareGroupedGemm() {
  cudaError_t status = cudaSuccess;
#define JAX_W4MOE_CASE(...)                                                                    \
  if (status == cudaSuccess) {                                                                 \
    using Tile = GroupedGemmTile<__VA_ARGS__>;                                                 \
    status =                                                                                   \
        cudaFuncSetAttribute(GroupedGemm<Tile, Epilogue>,                                      \
                             cudaFuncAttributeMaxDynamicSharedMemorySize, Tile::kSharedBytes); \
  }
  JAX_W4MOE_TILES(JAX_W4MOE_CASE)
#undef JAX_W4MOE_CASE
  return status;
}

template <typename Epilogue>
void LaunchGroupedGemm(int64_t tile_tokens, const GroupedGemmParams& params,
                       const Epilogue& epilogue, int num_sms, cudaStream_t stream) {
#define JAX_W4MOE_CASE(...)                                                                   \
  if (tile_tokens == GroupedGemmTile<__VA_ARGS__>::kTokens) {                                 \
    using Tile = GroupedGemmTile<__VA_ARGS__>;                                                \
    LaunchDependent(GroupedGemm<Tile, Epilogue>, num_sms, Tile::kThreads, Tile::kSharedBytes, \
                    stream, params, epilogue);                                                \
  }
  JAX_W4MOE_TILES(JAX_W4MOE_CASE)
#undef JAX_W4MOE_CASE
}

#define JAX_W4MOE_COMPILE_EPILOGUE(Epilogue)                                                    \
  template cudaError_t PrepareGroupedGemm<Epilogue>();                                          \
  template void LaunchGroupedGemm<Epilogue>(int64_t, const GroupedGemmParams&, const Epilogue&, \
                                            int, cudaStream_t);

}  // namespace jax_w4moe
