// The two projections of all experts with the activation between them, on rows in a token image:
// what fused_moe and expert_mlp share.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/scale_rule.h"
#include "epilogue/activation.h"
#include "formats/formats.h"
#include "launch/launch.h"
#include "schedule/plan.h"
#include "schedule/rows.cuh"

namespace jax_w4moe {

struct Experts {
  Operands operands;
  const void* w13;        // u8[E, w13_row_blocks, w13_k_blocks, record bytes]
  const void* w2;         // u8[E, w2_row_blocks, w2_k_blocks, record bytes]
  const float* w13_bias;  // f32[E, w13_row_blocks, 64], or null
  const float* w2_bias;   // f32[E, H], or null
  int64_t num_experts;
  int64_t hidden_size;
  int64_t w13_row_blocks;
  int64_t w13_k_blocks;
  int64_t w2_row_blocks;
  int64_t w2_k_blocks;
  int64_t tile_tokens;
  Activation activation;
  ScaleRule x_rule;
  ScaleRule h_rule;
};

// Parts of a workspace for `rows` rows.
struct ExpertsWorkspace {
  Plan plan;
  int* row_tags;
  TokenImage x;
  TokenImage h_image;
  __nv_bfloat16* h;

  ExpertsWorkspace(const Experts& experts, int64_t rows, Arena& arena);
};

// From x in the workspace, placed as plan and row_tags say, to out bf16[rows, H], row by row;
// rows of no expert are not written. plan_is_old: the plan was complete before the preceding kernel
// began; few: what it is made from, if that is little and was complete.
cudaError_t LaunchExperts(const Experts& experts, const ExpertsWorkspace& workspace, int num_rows,
                          bool plan_is_old, const FewPairs& few, __nv_bfloat16* out,
                          cudaStream_t stream);

// Whether LaunchExpertsOfOneToken can do it.
bool TakesOneToken(const Experts& experts);

// The same for one token of `top_k` slots, from x bf16[H] to out bf16[top_k, H] by slot. These are
// the first launches of an op.
cudaError_t LaunchExpertsOfOneToken(const Experts& experts, const ExpertsWorkspace& workspace,
                                    const void* x, const int* topk_ids, int top_k,
                                    __nv_bfloat16* out, cudaStream_t stream);

}  // namespace jax_w4moe
