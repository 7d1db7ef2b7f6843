// The launches of grouped_matmul.
#include "epilogue/scaled_store.cuh"
#include "kernels/zero_tail.cuh"
#include "launch/grouped_gemm.cuh"
#include "launch/grouped_matmul.h"
#include "launch/permute.h"

namespace jax_w4moe {
namespace {

template <typename Out>
void LaunchWithOutput(const GroupedMatmulParams& p, const GroupedGemmParams& gemm, int num_sms,
                      cudaStream_t stream) {
  Out* out = static_cast<Out*>(p.out);
  const ScaledStore<Out> store{out, p.x_scale, nullptr, static_cast<int>(p.num_rows), p.gate_up};
  LaunchGroupedGemm(p.tile_tokens, gemm, store, num_sms, stream);
  ZeroTail<<<num_sms, 256, 0, stream>>>(out, p.num_tokens, p.num_rows, gemm.num_experts, gemm.plan);
}

}  // namespace

bool HasTile(int64_t tile_tokens) { return TileWarpgroups(tile_tokens) != 0; }

int64_t GroupedMatmulWorkspaceBytes(int64_t num_tokens, int64_t num_experts, int64_t k_blocks) {
  return Plan::kBytes + NumAtoms(num_tokens, num_experts) * k_blocks * 1024;
}

cudaError_t PrepareGroupedMatmul() {
  const cudaError_t status = PrepareGroupedGemm<ScaledStore<float>>();
  return status == cudaSuccess ? PrepareGroupedGemm<ScaledStore<__nv_bfloat16>>() : status;
}

cudaError_t LaunchGroupedMatmul(const GroupedMatmulParams& p, cudaStream_t stream) {
  if (p.num_tokens == 0) return cudaSuccess;
  int num_sms = 0;
  const cudaError_t status = NumSms(&num_sms);
  if (status != cudaSuccess) return status;

  const int num_experts = static_cast<int>(p.num_experts);
  const int num_atoms = static_cast<int>(NumAtoms(p.num_tokens, p.num_experts));
  const int warpgroups = TileWarpgroups(p.tile_tokens);
  const int row_tiles = static_cast<int>((p.row_blocks + warpgroups - 1) / warpgroups);
  uint8_t* image = static_cast<uint8_t*>(p.workspace) + Plan::kBytes;
  const GroupedGemmParams gemm{static_cast<const uint8_t*>(p.records),
                               image,
                               Plan::At(p.workspace),
                               num_experts,
                               static_cast<int>(p.row_blocks),
                               static_cast<int>(p.k_blocks),
                               num_atoms};
  LaunchPlanGroups(p.group_sizes, num_experts, p.num_tokens, p.tile_tokens, row_tiles, gemm.plan,
                   stream);
  LaunchWriteTokenImage(p.lhs, image, num_experts, p.contraction, num_atoms, gemm.plan, {}, stream);
  if (p.out_is_f32) {
    LaunchWithOutput<float>(p, gemm, num_sms, stream);
  } else {
    LaunchWithOutput<__nv_bfloat16>(p, gemm, num_sms, stream);
  }
  return cudaGetLastError();
}

}  // namespace jax_w4moe
