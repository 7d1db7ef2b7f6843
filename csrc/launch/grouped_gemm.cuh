// The definitions of grouped_gemm.h, for the files that compile a format each.
#pragma once

#include <algorithm>
#include <type_traits>

#include "kernels/grouped_gemm.cuh"
#include "kernels/one_token.cuh"
#include "launch/grouped_gemm.h"
#include "launch/grouped_gemm_tiles.h"
#include "launch/launch.h"

namespace jax_w4moe {

// Calls f with every tile for a decoder and activations, as a pointer to its type.
template <typename Decoder, typename Activations, typename F>
void ForEachTile(const F& f) {
  constexpr int kGroups = FormatTraits<Decoder>::kGroups;
#define JAX_W4MOE_CASE(subtiles, width, warpgroups, stages, least, most)                        \
  if constexpr (kGroups >= least && kGroups <= most) {                                          \
    f(static_cast<GroupedGemmTile<Decoder, Activations, subtiles, width, warpgroups, stages>*>( \
        nullptr));                                                                              \
  }
  if constexpr (std::is_same_v<Activations, Fp8Activations>) {
    JAX_W4MOE_FP8_TILES(JAX_W4MOE_CASE)
  } else {
    JAX_W4MOE_BF16_TILES(JAX_W4MOE_CASE)
  }
#undef JAX_W4MOE_CASE
}

template <typename Decoder, typename Activations>
cudaError_t PrepareTiles() {
  using OneToken = OneTokenTile<Decoder, Activations>;
  cudaError_t status = cudaFuncSetAttribute(
      OneTokenGemm<OneToken>, cudaFuncAttributeMaxDynamicSharedMemorySize, OneToken::kSharedBytes);
  ForEachTile<Decoder, Activations>([&](auto* tile) {
    using Tile = std::remove_pointer_t<decltype(tile)>;
    if (status != cudaSuccess) return;
    status = cudaFuncSetAttribute(GroupedGemm<Tile>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  Tile::kSharedBytes);
  });
  return status;
}

template <typename Decoder, typename Activations>
void LaunchTile(int64_t tile_tokens, const GroupedGemmParams& params, const Epilogue& epilogue,
                int num_sms, cudaStream_t stream) {
  ForEachTile<Decoder, Activations>([&](auto* tile) {
    using Tile = std::remove_pointer_t<decltype(tile)>;
    if (tile_tokens != Tile::kTokens) return;
    LaunchDependent(GroupedGemm<Tile>, num_sms, Tile::kThreads, Tile::kSharedBytes, stream, params,
                    epilogue);
  });
}

template <typename Decoder, typename Activations>
void LaunchOneTokenTile(const OneTokenParams& params, const Epilogue& epilogue, int num_sms,
                        cudaStream_t stream) {
  using Tile = OneTokenTile<Decoder, Activations>;
  const int num_ctas = std::max(num_sms, params.num_slots);  // every slot has one at least
  Launch(!params.is_first, OneTokenGemm<Tile>, num_ctas, Tile::kThreads, Tile::kSharedBytes, stream,
         params, epilogue);
}

#define JAX_W4MOE_COMPILE(Decoder, Activations)                                                  \
  template cudaError_t PrepareTiles<Decoder, Activations>();                                     \
  template void LaunchTile<Decoder, Activations>(int64_t, const GroupedGemmParams&,              \
                                                 const Epilogue&, int, cudaStream_t);            \
  template void LaunchOneTokenTile<Decoder, Activations>(const OneTokenParams&, const Epilogue&, \
                                                         int, cudaStream_t);

}  // namespace jax_w4moe
