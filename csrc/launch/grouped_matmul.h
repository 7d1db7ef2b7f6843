// Launcher of grouped_matmul: plan, token image, grouped GEMM.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/scale_rule.h"
#include "formats/formats.h"

namespace jax_w4moe {

struct GroupedMatmulParams {
  Operands operands;
  const void* lhs;         // bf16[M, K], or e4m3 with x_scale
  const float* x_scale;    // f32[M], or null
  const void* records;     // u8[E, row_blocks, k_blocks, record bytes]
  const int* group_sizes;  // i32[E]
  void* out;               // [M, num_columns], bf16 or f32
  void* workspace;         // GroupedMatmulWorkspaceBytes
  int64_t num_rows;        // M
  int64_t contraction;     // K
  int64_t num_experts;     // E
  int64_t row_blocks;
  int64_t k_blocks;
  int64_t num_columns;  // logical N
  int64_t tile_tokens;  // a row of the tile table
  ScaleRule x_rule;
  bool gate_up;
  bool out_is_f32;
};

// panels: of a row of the token image. The same formula as jax_w4moe/ops/grouped_matmul.py; a test
// compares them.
int64_t GroupedMatmulWorkspaceBytes(int64_t num_rows, int64_t panels, int64_t num_experts);

cudaError_t LaunchGroupedMatmul(const GroupedMatmulParams& params, cudaStream_t stream);

}  // namespace jax_w4moe
