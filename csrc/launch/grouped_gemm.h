// The launcher of the grouped GEMM. Each epilogue is compiled in a file of its own,
// grouped_gemm_<epilogue>.cu.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "epilogue/either.cuh"
#include "epilogue/scaled_store.cuh"
#include "epilogue/swiglu.cuh"
#include "kernels/grouped_gemm.cuh"

namespace jax_w4moe {

// Of w13 and w2; a grouped_matmul with bf16 results is the second alone.
using LayerEpilogue = Either<SwiGlu, ScaledStore<__nv_bfloat16>>;

// Raises the shared-memory limit of every tile with this epilogue on the current device.
template <typename Epilogue>
cudaError_t PrepareGroupedGemm();

// tile_tokens: of a tile in the table.
template <typename Epilogue>
void LaunchGroupedGemm(int64_t tile_tokens, const GroupedGemmParams& params,
                       const Epilogue& epilogue, int num_sms, cudaStream_t stream);

}  // namespace jax_w4moe
