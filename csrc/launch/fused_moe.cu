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

// A chunk of tokens: where it begins.
struct Chunk {
  const uint8_t* x;
  const float* x_scale;  // or null
  const int* topk_ids;
  const float* topk_weights;
  __nv_bfloat16* y;
  int num_tokens;

  Chunk(const FusedMoeParams& p, int64_t first, int num_tokens)
      : x(static_cast<const uint8_t*>(p.x) + first * p.experts.hidden_size * (p.x_scale ? 1 : 2)),
        x_scale(p.x_scale ? p.x_scale + first : nullptr),
        topk_ids(p.topk_ids + first * p.top_k),
        topk_weights(p.topk_weights + first * p.top_k),
        y(static_cast<__nv_bfloat16*>(p.y) + first * p.experts.hidden_size),
        num_tokens(num_tokens) {}
};

template <typename Places>
cudaError_t LaunchCombine(const Experts& e, const Workspace& ws, const Chunk& chunk, int top_k,
                          const Places& places, cudaStream_t stream) {
  const int hidden = static_cast<int>(e.hidden_size);
  constexpr int kColumns = kCombineThreads * kCombineColumns;
  LaunchDependent(CombineSlots<Places>, dim3(chunk.num_tokens, (hidden + kColumns - 1) / kColumns),
                  kCombineThreads, 0, stream, ws.slots, places, chunk.topk_weights, top_k, hidden,
                  chunk.y);
  return cudaGetLastError();
}

cudaError_t LaunchOneToken(const Experts& e, const Workspace& ws, const Chunk& chunk, int top_k,
                           cudaStream_t stream) {
  const cudaError_t status =
      LaunchExpertsOfOneToken(e, ws.experts, chunk.x, chunk.topk_ids, top_k, ws.slots, stream);
  if (status != cudaSuccess) return status;
  return LaunchCombine(e, ws, chunk, top_k,
                       PlacesOfOneToken{chunk.topk_ids, static_cast<int>(e.num_experts)}, stream);
}

cudaError_t LaunchChunk(const Experts& e, const Workspace& ws, const Chunk& chunk, int top_k,
                        cudaStream_t stream) {
  if (chunk.num_tokens == 1 && !chunk.x_scale && TakesOneToken(e)) {
    return LaunchOneToken(e, ws, chunk, top_k, stream);
  }
  const int num_pairs = chunk.num_tokens * top_k, num_experts = static_cast<int>(e.num_experts);
  LaunchRoute(Rows{chunk.x, chunk.x_scale, static_cast<int>(e.hidden_size), e.operands, e.x_rule},
              chunk.num_tokens,
              Routing{chunk.topk_ids, top_k, num_experts, static_cast<int>(e.tile_tokens),
                      ws.block_counts, ws.experts.plan, ws.places, ws.experts.row_tags},
              ws.experts.x, stream);
  FewPairs few{};
  if (num_pairs <= kFewPairs) few = {chunk.topk_ids, num_pairs, num_experts};
  const cudaError_t status =
      LaunchExperts(e, ws.experts, num_pairs, CountedBlocks(num_pairs) > 0, few, ws.slots, stream);
  if (status != cudaSuccess) return status;
  return LaunchCombine(e, ws, chunk, top_k, PlacesOfTable{ws.places}, stream);
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
    const cudaError_t status =
        LaunchChunk(p.experts, ws, Chunk(p, first, num_tokens), static_cast<int>(p.top_k), stream);
    if (status != cudaSuccess) return status;
  }
  return cudaSuccess;
}

}  // namespace jax_w4moe
