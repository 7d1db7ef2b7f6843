// The launcher of the grouped GEMM.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "epilogue/either.cuh"
#include "epilogue/scaled_store.cuh"
#include "epilogue/swiglu.cuh"
#include "formats/formats.h"
#include "kernels/load_items.cuh"

namespace jax_w4moe {

// Of w13 and w2; a grouped_matmul with bf16 results is the second alone.
using LayerEpilogue = Either<SwiGlu, ScaledStore<__nv_bfloat16>>;

#define JAX_W4MOE_CASE(Format, name) struct Format;
JAX_W4MOE_FORMATS(JAX_W4MOE_CASE)
#undef JAX_W4MOE_CASE

// Of one format: defined in grouped_gemm.cuh, compiled in a file for each format and epilogue that
// CMakeLists.txt writes.
template <typename Format, typename Epilogue>
cudaError_t PrepareTiles();
template <typename Format, typename Epilogue>
void LaunchTile(int64_t tile_tokens, const GroupedGemmParams& params, const Epilogue& epilogue,
                int num_sms, cudaStream_t stream);

// Raises the shared-memory limit of every tile with this epilogue on the current device.
template <typename Epilogue>
cudaError_t PrepareGroupedGemm(WeightFormat format) {
  switch (format) {
#define JAX_W4MOE_CASE(Format, name) \
  case WeightFormat::k##Format:      \
    return PrepareTiles<Format, Epilogue>();
    JAX_W4MOE_FORMATS(JAX_W4MOE_CASE)
#undef JAX_W4MOE_CASE
  }
  return cudaErrorInvalidValue;
}

// tile_tokens: of a tile in the table.
template <typename Epilogue>
void LaunchGroupedGemm(WeightFormat format, int64_t tile_tokens, const GroupedGemmParams& params,
                       const Epilogue& epilogue, int num_sms, cudaStream_t stream) {
  switch (format) {
#define JAX_W4MOE_CASE(Format, name)                                              \
  case WeightFormat::k##Format:                                                   \
    LaunchTile<Format, Epilogue>(tile_tokens, params, epilogue, num_sms, stream); \
    break;
    JAX_W4MOE_FORMATS(JAX_W4MOE_CASE)
#undef JAX_W4MOE_CASE
  }
}

}  // namespace jax_w4moe
