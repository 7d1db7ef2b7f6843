// Launchers of what comes before a grouped GEMM: where each row goes, and the token image.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/scale_rule.h"
#include "formats/formats.h"
#include "schedule/plan.h"
#include "schedule/rows.cuh"

namespace jax_w4moe {

// The rows that an op is given.
struct Rows {
  const void* x;         // bf16[rows, width], or e4m3 with x_scale
  const float* x_scale;  // f32[rows], or null for bf16
  int width;
  Operands operands;  // what the image is for
  ScaleRule rule;     // of bf16 rows
};

// Routing as it is asked for, and where its outcome goes.
struct Routing {
  const int* topk_ids;  // i32[tokens, top_k]
  int top_k;
  int num_experts;
  int tile_tokens;
  int* block_counts;  // CountedBlocks(pairs) * (num_experts + 1)
  Plan plan;
  Place* places;  // [tokens, top_k]
  int* row_tags;  // [tokens * top_k]
};

// Blocks of pairs whose experts are counted apart.
int64_t CountedBlocks(int64_t num_pairs);

// Routes tokens and writes the rows of their experts.
void LaunchRoute(const Rows& tokens, int num_tokens, const Routing& routing,
                 const TokenImage& image, cudaStream_t stream);

// Groups of rows as a caller brings them, and the op's result.
struct Groups {
  const int* group_sizes;  // i32[num_experts]
  int num_experts;
  int rows_per_expert;  // 0: one group behind the other (PlanGroups)
  int tile_tokens;
  Plan plan;
  int* row_tags;  // [rows], written, or null
  void* out;      // rows of no group are set to zero
  int64_t out_bytes;
};

// Plans the groups and writes their rows.
void LaunchGroup(const Rows& rows, int num_rows, const Groups& groups, const TokenImage& image,
                 cudaStream_t stream);

// bf16 rows that the preceding kernel writes and counts, for the following one.
void LaunchRequantize(const Rows& h, int num_rows, const Handover& handover,
                      const TokenImage& image, cudaStream_t stream);

}  // namespace jax_w4moe
