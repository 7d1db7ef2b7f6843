// The launches of grouped_matmul, and its workspace.
#include "launch/grouped_gemm.h"
#include "launch/grouped_matmul.h"
#include "launch/launch.h"
#include "launch/token_image.h"

namespace jax_w4moe {
namespace {

struct Workspace {
  Arena arena;
  Plan plan;
  TokenImage image;

  Workspace(int64_t num_rows, int64_t panels, int64_t num_experts, void* base)
      : arena(base),
        plan(Plan::At(arena.Take<uint8_t>(Plan::Bytes(num_rows, num_experts)))),
        image{arena.Take<uint8_t>(num_rows * panels * 128), arena.Take<float>(num_rows), num_rows} {
  }
};

}  // namespace

int64_t GroupedMatmulWorkspaceBytes(int64_t num_rows, int64_t panels, int64_t num_experts) {
  return Workspace(num_rows, panels, num_experts, nullptr).arena.used();
}

cudaError_t LaunchGroupedMatmul(const GroupedMatmulParams& p, cudaStream_t stream) {
  if (p.num_rows == 0) return cudaSuccess;
  int num_sms = 0;
  const cudaError_t status = NumSms(&num_sms);
  if (status != cudaSuccess) return status;

  const Workspace ws(p.num_rows, p.k_blocks * p.operands.Panels(), p.num_experts, p.workspace);
  const int num_experts = static_cast<int>(p.num_experts);
  LaunchGroup(Rows{p.lhs, p.x_scale, static_cast<int>(p.contraction), p.operands, p.x_rule},
              static_cast<int>(p.num_rows),
              Groups{p.group_sizes, num_experts, 0, static_cast<int>(p.tile_tokens), ws.plan,
                     nullptr, p.out, p.num_columns * (p.out_is_f32 ? 4 : 2)},
              ws.image, stream);
  const Records weights{static_cast<const uint8_t*>(p.records), static_cast<int>(p.row_blocks),
                        static_cast<int>(p.k_blocks)};
  const GroupedGemmParams gemm{
      weights, ws.image.data, ws.image.row_scale, ws.plan, ws.image.num_rows, 0, true, FewPairs{}};
  const int columns = static_cast<int>(p.num_columns);
  const Epilogue epilogue{p.out_is_f32 ? EpilogueKind::kStoreF32 : EpilogueKind::kStore, Gated{},
                          ScaledStore{p.out, nullptr, columns, p.gate_up}};
  LaunchGroupedGemm(p.operands, p.tile_tokens, gemm, epilogue, num_sms, stream);
  return cudaGetLastError();
}

}  // namespace jax_w4moe
