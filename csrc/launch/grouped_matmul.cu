// The tiles of grouped_matmul and its launches.
#include <algorithm>

#include "kernels/grouped_gemm.cuh"
#include "kernels/plan.cuh"
#include "kernels/token_image.cuh"
#include "launch/grouped_matmul.h"

namespace jax_w4moe {
namespace {

constexpr int kMaxTileTokens = 128;

// Every compiled tile: tokens, math warpgroups, stages.
#define JAX_W4MOE_TILES(X) X(8, 3, 12) X(16, 3, 11) X(32, 3, 9) X(64, 3, 7) X(128, 2, 6)

int64_t NumAtoms(int64_t num_tokens, int64_t num_experts) {
  const int64_t padding = std::min(num_tokens, num_experts) * (kTokenAtom - 1);
  // The last tile may read beyond the last expert's atoms.
  return (num_tokens + padding + kTokenAtom - 1) / kTokenAtom + kMaxTileTokens / kTokenAtom;
}

template <int kTokens, int kWarpgroups, int kStages, typename Out>
cudaError_t Prepare() {
  return cudaFuncSetAttribute(GroupedGemm<kTokens, kWarpgroups, kStages, Out>,
                              cudaFuncAttributeMaxDynamicSharedMemorySize,
                              GroupedGemmTile<kTokens, kWarpgroups, kStages>::kSharedBytes);
}

template <int kTokens, int kWarpgroups, int kStages, typename Out>
void LaunchGemm(const GroupedGemmParams& p, int num_sms, cudaStream_t stream) {
  using Tile = GroupedGemmTile<kTokens, kWarpgroups, kStages>;
  GroupedGemm<kTokens, kWarpgroups, kStages, Out>
      <<<num_sms, Tile::kThreads, Tile::kSharedBytes, stream>>>(p);
}

int Warpgroups(int64_t tile_tokens) {
#define JAX_W4MOE_CASE(tokens, warpgroups, stages) \
  if (tile_tokens == tokens) return warpgroups;
  JAX_W4MOE_TILES(JAX_W4MOE_CASE)
#undef JAX_W4MOE_CASE
  return 0;
}

}  // namespace

int64_t GroupedMatmulWorkspaceBytes(int64_t num_tokens, int64_t num_experts, int64_t k_blocks) {
  return Plan::kBytes + NumAtoms(num_tokens, num_experts) * k_blocks * 1024;
}

bool HasGroupedMatmulTile(int64_t tile_tokens) { return Warpgroups(tile_tokens) != 0; }

cudaError_t PrepareGroupedMatmul() {
  cudaError_t status = cudaSuccess;
#define JAX_W4MOE_CASE(tokens, warpgroups, stages)                                          \
  if (status == cudaSuccess) status = Prepare<tokens, warpgroups, stages, __nv_bfloat16>(); \
  if (status == cudaSuccess) status = Prepare<tokens, warpgroups, stages, float>();
  JAX_W4MOE_TILES(JAX_W4MOE_CASE)
#undef JAX_W4MOE_CASE
  return status;
}

cudaError_t LaunchGroupedMatmul(const GroupedMatmulParams& p, cudaStream_t stream) {
  if (p.num_tokens == 0) return cudaSuccess;
  int device = 0, num_sms = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  status = cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device);
  if (status != cudaSuccess) return status;

  const Plan plan = Plan::At(p.workspace);
  uint8_t* image = static_cast<uint8_t*>(p.workspace) + Plan::kBytes;
  const int num_experts = static_cast<int>(p.num_experts);
  const int num_atoms = static_cast<int>(NumAtoms(p.num_tokens, p.num_experts));
  const int warpgroups = Warpgroups(p.tile_tokens);
  const int row_tiles = static_cast<int>((p.row_blocks + warpgroups - 1) / warpgroups);
  PlanGroups<<<1, kMaxExperts, 0, stream>>>(p.group_sizes, num_experts,
                                            static_cast<int>(p.num_tokens),
                                            static_cast<int>(p.tile_tokens), row_tiles, plan);
  WriteTokenImage<<<num_atoms * kTokenAtom, kImageThreads, 0, stream>>>(
      static_cast<const uint8_t*>(p.lhs), image, num_experts, static_cast<int>(p.contraction),
      num_atoms, plan);
  const GroupedGemmParams gemm{static_cast<const uint8_t*>(p.records),
                               image,
                               p.x_scale,
                               p.out,
                               plan,
                               num_experts,
                               static_cast<int>(p.row_blocks),
                               static_cast<int>(p.k_blocks),
                               num_atoms,
                               static_cast<int>(p.num_rows),
                               p.gate_up};
#define JAX_W4MOE_CASE(tokens, warpgroups, stages)                                  \
  if (p.tile_tokens == tokens) {                                                    \
    if (p.out_is_f32) {                                                             \
      LaunchGemm<tokens, warpgroups, stages, float>(gemm, num_sms, stream);         \
    } else {                                                                        \
      LaunchGemm<tokens, warpgroups, stages, __nv_bfloat16>(gemm, num_sms, stream); \
    }                                                                               \
  }
  JAX_W4MOE_TILES(JAX_W4MOE_CASE)
#undef JAX_W4MOE_CASE
  if (p.out_is_f32) {
    ZeroTail<<<num_sms, 256, 0, stream>>>(static_cast<float*>(p.out), p.num_tokens, p.num_rows,
                                          num_experts, plan);
  } else {
    ZeroTail<<<num_sms, 256, 0, stream>>>(static_cast<__nv_bfloat16*>(p.out), p.num_tokens,
                                          p.num_rows, num_experts, plan);
  }
  return cudaGetLastError();
}

}  // namespace jax_w4moe
