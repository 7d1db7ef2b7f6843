// Launcher of expert_mlp: plan and quantise, the experts.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "launch/experts.h"

namespace jax_w4moe {

struct ExpertMlpParams {
  const void* x;         // bf16[M, H], or e4m3 with x_scale
  const float* x_scale;  // f32[M], or null
  Experts experts;
  const int* group_sizes;   // i32[E]
  void* out;                // bf16[M, H]
  void* workspace;          // ExpertMlpWorkspaceBytes
  int64_t num_rows;         // M
  int64_t rows_per_expert;  // M / E of the masked layout, or 0 for groups one behind the other
};

// The same formula as jax_w4moe/ops/expert_mlp.py; a test compares them.
int64_t ExpertMlpWorkspaceBytes(const ExpertMlpParams& params);

cudaError_t LaunchExpertMlp(const ExpertMlpParams& params, cudaStream_t stream);

}  // namespace jax_w4moe
