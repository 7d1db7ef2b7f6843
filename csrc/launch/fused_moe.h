// Launcher of fused_moe: route, token image, w13 with SwiGLU, requantise, w2, combine.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace jax_w4moe {

struct FusedMoeParams {
  const void* x;              // e4m3[T, H]
  const float* x_scale;       // f32[T]
  const void* w13;            // u8[E, w13_row_blocks, w13_k_blocks, 4352]
  const void* w2;             // u8[E, w2_row_blocks, w2_k_blocks, 4352]
  const float* w13_bias;      // f32[E, w13_row_blocks, 64], or null
  const float* w2_bias;       // f32[E, H], or null
  const int* topk_ids;        // i32[T, k]
  const float* topk_weights;  // f32[T, k]
  void* y;                    // bf16[T, H]
  void* workspace;            // FusedMoeWorkspaceBytes
  int64_t num_tokens;
  int64_t hidden_size;
  int64_t num_experts;
  int64_t top_k;
  int64_t w13_row_blocks;
  int64_t w13_k_blocks;
  int64_t w2_row_blocks;
  int64_t w2_k_blocks;
  int64_t tile_tokens;
  float alpha;
  float beta;
  float limit;  // infinite for no clamp
};

// The same formula as jax_w4moe/ops/fused_moe.py; a test compares them.
int64_t FusedMoeWorkspaceBytes(const FusedMoeParams& params);

// Raises the shared-memory limits on the current device.
cudaError_t PrepareFusedMoe();

cudaError_t LaunchFusedMoe(const FusedMoeParams& params, cudaStream_t stream);

}  // namespace jax_w4moe
