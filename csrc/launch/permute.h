// Launchers of what comes before a grouped GEMM: the plan and the token image.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "schedule/grouped.cuh"

namespace jax_w4moe {

// Group sizes to the plan of one grouped GEMM.
void LaunchPlanGroups(const int* group_sizes, int num_experts, int64_t num_rows,
                      int64_t tile_tokens, int64_t row_tiles, const Plan& plan,
                      cudaStream_t stream);

// Where the rows of an image come from, when not from lhs in order.
struct Permutation {
  const int* pair_of_row = nullptr;
  int top_k = 1;
  const float* x_scale = nullptr;  // by token
  float* row_scale = nullptr;      // by row, written
};

// E4M3 rows to their image.
void LaunchWriteTokenImage(const void* lhs, uint8_t* image, int num_experts, int64_t width,
                           int num_atoms, const Plan& plan, const Permutation& permutation,
                           cudaStream_t stream);

// bf16 rows, quantised by their given amax, to their image.
void LaunchQuantizeTokenImage(const __nv_bfloat16* h, const uint32_t* amax_bits, uint8_t* image,
                              float* row_scale, int num_experts, int64_t width, int num_atoms,
                              const Plan& plan, cudaStream_t stream);

}  // namespace jax_w4moe
