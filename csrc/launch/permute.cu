// The launches of permute.h.
#include "kernels/plan.cuh"
#include "kernels/token_image.cuh"
#include "launch/permute.h"

namespace jax_w4moe {

void LaunchPlanGroups(const int* group_sizes, int num_experts, int64_t num_rows,
                      int64_t tile_tokens, int64_t row_tiles, const Plan& plan,
                      cudaStream_t stream) {
  PlanGroups<<<1, kMaxExperts, 0, stream>>>(group_sizes, num_experts, static_cast<int>(num_rows),
                                            static_cast<int>(tile_tokens),
                                            static_cast<int>(row_tiles), plan);
}

void LaunchWriteTokenImage(const void* lhs, uint8_t* image, int num_experts, int64_t width,
                           int num_atoms, const Plan& plan, const Permutation& permutation,
                           cudaStream_t stream) {
  WriteTokenImage<<<num_atoms * kTokenAtom, kImageThreads, 0, stream>>>(
      static_cast<const uint8_t*>(lhs), image, num_experts, static_cast<int>(width), num_atoms,
      plan, permutation.pair_of_row, permutation.top_k, permutation.x_scale, permutation.row_scale);
}

void LaunchQuantizeTokenImage(const __nv_bfloat16* h, const uint32_t* amax_bits, uint8_t* image,
                              float* row_scale, int num_experts, int64_t width, int num_atoms,
                              const Plan& plan, cudaStream_t stream) {
  QuantizeTokenImage<<<num_atoms * kTokenAtom, kQuantizeThreads, 0, stream>>>(
      h, amax_bits, image, row_scale, num_experts, static_cast<int>(width), num_atoms, plan);
}

}  // namespace jax_w4moe
