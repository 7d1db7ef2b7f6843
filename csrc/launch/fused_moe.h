// Launcher of fused_moe: route and quantise, the experts, combine.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "launch/experts.h"

namespace jax_w4moe {

struct FusedMoeParams {
  const void* x;         // bf16[T, H], or e4m3 with x_scale
  const float* x_scale;  // f32[T], or null
  Experts experts;
  const int* topk_ids;        // i32[T, k]
  const float* topk_weights;  // f32[T, k]
  void* y;                    // bf16[T, H]
  void* workspace;            // FusedMoeWorkspaceBytes
  int64_t num_tokens;
  int64_t top_k;
};

// The same formula as jax_w4moe/ops/fused_moe.py; a test compares them.
int64_t FusedMoeWorkspaceBytes(const FusedMoeParams& params);

cudaError_t LaunchFusedMoe(const FusedMoeParams& params, cudaStream_t stream);

}  // namespace jax_w4moe
