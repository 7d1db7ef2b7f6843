// The launches of expert_mlp, and its workspace.
#include "launch/expert_mlp.h"
#include "launch/token_image.h"

namespace jax_w4moe {

int64_t ExpertMlpWorkspaceBytes(const ExpertMlpParams& p) {
  Arena arena(nullptr);
  ExpertsWorkspace(p.experts, p.num_rows, arena);
  return arena.used();
}

cudaError_t LaunchExpertMlp(const ExpertMlpParams& p, cudaStream_t stream) {
  if (p.num_rows == 0) return cudaSuccess;
  Arena arena(p.workspace);
  const ExpertsWorkspace ws(p.experts, p.num_rows, arena);
  const int num_rows = static_cast<int>(p.num_rows);
  LaunchGroup(Rows{p.x, p.x_scale, static_cast<int>(p.experts.hidden_size), p.experts.operands,
                   p.experts.x_rule},
              num_rows,
              Groups{p.group_sizes, static_cast<int>(p.experts.num_experts),
                     static_cast<int>(p.rows_per_expert), static_cast<int>(p.experts.tile_tokens),
                     ws.plan, ws.row_tags, p.out, 2 * p.experts.hidden_size},
              ws.x, stream);
  return LaunchExperts(p.experts, ws, num_rows, true, FewPairs{},
                       static_cast<__nv_bfloat16*>(p.out), stream);
}

}  // namespace jax_w4moe
