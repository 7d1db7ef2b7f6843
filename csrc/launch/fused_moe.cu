// The launches of fused_moe, and its workspace.
#include <algorithm>

#include "kernels/combine.cuh"
#include "launch/fused_moe.h"
#include "launch/launch.h"
#include "launch/token_image.h"

namespace jax_w4moe {
namespace {

// More rows than this are worked off in chunks of whole tokens, which bounds the workspace. Results
// do not depend on it: no token's does on the others.
constexpr int64_t kMaxRows = 65536;

int64_t ChunkTokens(const FusedMoeParams& p) {
  return std::min(p.num_tokens, std::max<int64_t>(1, kMaxRows / p.top_k));
}

struct Workspace {
  Arena arena;
  ExpertsWorkspace experts;
  int* block_counts;
  Place* places;
  __nv_bfloat16* slots;

  Workspace(const FusedMoeParams& p, int64_t rows, void* base)
      : arena(base),
        experts(p.experts, rows, arena),
        block_counts(arena.Take<int>(CountedBlocks(rows) * (p.experts.num_experts + 1))),
        places(arena.Take<Place>(rows)),
        slots(arena.Take<__nv_bfloat16>(rows * p.experts.hidden_size)) {}
};

cudaError_t LaunchChunk(const FusedMoeParams& p, const Workspace& ws, int64_t first, int num_tokens,
                        cudaStream_t stream) {
  const int top_k = static_cast<int>(p.top_k), hidden = static_cast<int>(p.experts.hidden_size);
  const int num_pairs = num_tokens * top_k;
  const int bytes_per_token = hidden * (p.x_scale ? 1 : 2);
  LaunchRoute(
      Rows{static_cast<const uint8_t*>(p.x) + first * bytes_per_token,
           p.x_scale ? p.x_scale + first : nullptr, hidden, p.experts.operands, p.experts.x_rule},
      num_tokens,
      Routing{p.topk_ids + first * top_k, top_k, static_cast<int>(p.experts.num_experts),
              static_cast<int>(p.experts.tile_tokens), ws.block_counts, ws.experts.plan, ws.places,
              ws.experts.row_phase},
      ws.experts.x, stream);
  FewPairs few{};
  if (num_pairs <= kFewPairs) {
    few = {p.topk_ids + first * top_k, num_pairs, static_cast<int>(p.experts.num_experts)};
  }
  const cudaError_t status = LaunchExperts(p.experts, ws.experts, num_pairs,
                                           CountedBlocks(num_pairs) > 0, few, ws.slots, stream);
  if (status != cudaSuccess) return status;
  constexpr int kColumns = kCombineThreads * kCombineColumns;
  LaunchDependent(CombineSlots, dim3(num_tokens, (hidden + kColumns - 1) / kColumns),
                  kCombineThreads, 0, stream, ws.slots, ws.places, p.topk_weights + first * top_k,
                  top_k, hidden, static_cast<__nv_bfloat16*>(p.y) + first * hidden);
  return cudaGetLastError();
}

}  // namespace

int64_t FusedMoeWorkspaceBytes(const FusedMoeParams& p) {
  return Workspace(p, ChunkTokens(p) * p.top_k, nullptr).arena.used();
}

cudaError_t LaunchFusedMoe(const FusedMoeParams& p, cudaStream_t stream) {
  const int64_t chunk = ChunkTokens(p);
  const Workspace ws(p, chunk * p.top_k, p.workspace);
  for (int64_t first = 0; first < p.num_tokens; first += chunk) {
    const int num_tokens = static_cast<int>(std::min(chunk, p.num_tokens - first));
    const cudaError_t status = LaunchChunk(p, ws, first, num_tokens, stream);
    if (status != cudaSuccess) return status;
  }
  return cudaSuccess;
}

}  // namespace jax_w4moe
