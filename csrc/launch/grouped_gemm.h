// The launcher of the grouped GEMM.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <type_traits>

#include "epilogue/either.cuh"
#include "epilogue/scaled_store.cuh"
#include "epilogue/swiglu.cuh"
#include "formats/formats.h"
#include "kernels/load_items.cuh"
#include "mainloop/activations.cuh"

namespace jax_w4moe {

// Of w13 and w2; a grouped_matmul with bf16 results is the second alone.
using LayerEpilogue = Either<SwiGlu, ScaledStore<__nv_bfloat16>>;

#define JAX_W4MOE_CASE(Format, name) struct Format;
JAX_W4MOE_FORMATS(JAX_W4MOE_CASE)
#undef JAX_W4MOE_CASE

// Of one decoder and kind of activations: defined in grouped_gemm.cuh, compiled in a file for each
// format, activations and epilogue that CMakeLists.txt writes.
template <typename Decoder, typename Activations, typename Epilogue>
cudaError_t PrepareTiles();
template <typename Decoder, typename Activations, typename Epilogue>
void LaunchTile(int64_t tile_tokens, const GroupedGemmParams& params, const Epilogue& epilogue,
                int num_sms, cudaStream_t stream);

// Calls f with pointers to the decoder's type and the activations'.
template <typename F>
auto WithDecoder(Operands operands, const F& f) {
  auto with_activations = [&](auto* decoder) {
    return operands.is_bf16 ? f(decoder, static_cast<Bf16Activations*>(nullptr))
                            : f(decoder, static_cast<Fp8Activations*>(nullptr));
  };
  switch (operands.weights) {
#define JAX_W4MOE_CASE(Format, name) \
  case WeightFormat::k##Format:      \
    return with_activations(static_cast<Format*>(nullptr));
    JAX_W4MOE_FORMATS(JAX_W4MOE_CASE)
#undef JAX_W4MOE_CASE
  }
  return with_activations(static_cast<Mxfp4*>(nullptr));  // no other value
}

// Raises the shared-memory limit of every tile with this epilogue on the current device.
template <typename Epilogue>
cudaError_t PrepareGroupedGemm(Operands operands) {
  return WithDecoder(operands, [](auto* decoder, auto* activations) {
    return PrepareTiles<std::remove_pointer_t<decltype(decoder)>,
                        std::remove_pointer_t<decltype(activations)>, Epilogue>();
  });
}

// tile_tokens: of a tile in the table.
template <typename Epilogue>
void LaunchGroupedGemm(Operands operands, int64_t tile_tokens, const GroupedGemmParams& params,
                       const Epilogue& epilogue, int num_sms, cudaStream_t stream) {
  WithDecoder(operands, [&](auto* decoder, auto* activations) {
    LaunchTile<std::remove_pointer_t<decltype(decoder)>,
               std::remove_pointer_t<decltype(activations)>, Epilogue>(tile_tokens, params,
                                                                       epilogue, num_sms, stream);
  });
}

}  // namespace jax_w4moe
