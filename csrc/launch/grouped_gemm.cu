// The functions of grouped_gemm.h and prepare.h that choose what is compiled for the operands.
#include <type_traits>

#include "launch/grouped_gemm.h"
#include "launch/prepare.h"

namespace jax_w4moe {
namespace {

// Calls f with pointers to the decoder's type and the activations'.
template <typename F>
auto WithDecoder(Operands operands, const F& f) {
  return WithFormat(operands.weights, [&](auto* decoder) {
    return operands.is_bf16 ? f(decoder, static_cast<Bf16Activations*>(nullptr))
                            : f(decoder, static_cast<Fp8Activations*>(nullptr));
  });
}

}  // namespace

cudaError_t PrepareGroupedGemm(Operands operands) {
  return WithDecoder(operands, [](auto* decoder, auto* activations) {
    return PrepareTiles<std::remove_pointer_t<decltype(decoder)>,
                        std::remove_pointer_t<decltype(activations)>>();
  });
}

void LaunchGroupedGemm(Operands operands, int64_t tile_tokens, const GroupedGemmParams& params,
                       const Epilogue& epilogue, int num_sms, cudaStream_t stream) {
  WithDecoder(operands, [&](auto* decoder, auto* activations) {
    LaunchTile<std::remove_pointer_t<decltype(decoder)>,
               std::remove_pointer_t<decltype(activations)>>(tile_tokens, params, epilogue, num_sms,
                                                             stream);
  });
}

void LaunchOneTokenGemm(Operands operands, const OneTokenParams& params, const Epilogue& epilogue,
                        int num_sms, cudaStream_t stream) {
  WithDecoder(operands, [&](auto* decoder, auto* activations) {
    LaunchOneTokenTile<std::remove_pointer_t<decltype(decoder)>,
                       std::remove_pointer_t<decltype(activations)>>(params, epilogue, num_sms,
                                                                     stream);
  });
}

}  // namespace jax_w4moe
