// The launcher of the grouped GEMM.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <type_traits>

#include "epilogue/epilogue.cuh"
#include "formats/formats.h"
#include "kernels/load_items.cuh"
#include "mainloop/activations.cuh"
#include "schedule/one_token.cuh"

namespace jax_w4moe {

// Of one decoder and kind of activations: defined in grouped_gemm.cuh, compiled in a file for each
// format and kind of activations that CMakeLists.txt writes.
template <typename Decoder, typename Activations>
cudaError_t PrepareTiles();
template <typename Decoder, typename Activations>
void LaunchTile(int64_t tile_tokens, const GroupedGemmParams& params, const Epilogue& epilogue,
                int num_sms, cudaStream_t stream);
template <typename Decoder, typename Activations>
void LaunchOneTokenTile(const OneTokenParams& params, const Epilogue& epilogue, int num_sms,
                        cudaStream_t stream);

// tile_tokens: of a tile in the table.
void LaunchGroupedGemm(Operands operands, int64_t tile_tokens, const GroupedGemmParams& params,
                       const Epilogue& epilogue, int num_sms, cudaStream_t stream);
void LaunchOneTokenGemm(Operands operands, const OneTokenParams& params, const Epilogue& epilogue,
                        int num_sms, cudaStream_t stream);

}  // namespace jax_w4moe
