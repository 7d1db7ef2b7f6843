// The launches of fused_moe, and its workspace.
#include "epilogue/scaled_store.cuh"
#include "epilogue/swiglu.cuh"
#include "kernels/combine.cuh"
#include "kernels/route.cuh"
#include "launch/fused_moe.h"
#include "launch/grouped_gemm.cuh"
#include "launch/permute.h"

namespace jax_w4moe {
namespace {

// More rows than this are worked off in chunks of whole tokens, which bounds the workspace. Results
// do not depend on it: no token's does on the others.
constexpr int64_t kMaxRows = 65536;

int64_t ChunkTokens(const FusedMoeParams& p) {
  return std::min(p.num_tokens, std::max<int64_t>(1, kMaxRows / p.top_k));
}

// Hands out 128-byte aligned parts of the workspace; with a null base it only counts.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<uint8_t*>(base)) {}
  template <typename T>
  T* Take(int64_t count) {
    T* part = reinterpret_cast<T*>(base_ + used_);
    used_ += (count * static_cast<int64_t>(sizeof(T)) + 127) / 128 * 128;
    return part;
  }
  int64_t used() const { return used_; }

 private:
  uint8_t* base_;
  int64_t used_ = 0;
};

struct Workspace {
  Plan plan13, plan2;
  int* block_counts;
  int* group_sizes;
  int* row_of_pair;
  int* pair_of_row;
  float* x_scale;
  float* h_scale;
  uint32_t* h_amax_bits;
  uint8_t* x_image;
  uint8_t* h_image;
  __nv_bfloat16* h;
  __nv_bfloat16* slots;
  int64_t bytes;

  Workspace(const FusedMoeParams& p, void* base) {
    Arena arena(base);
    const int64_t rows = ChunkTokens(p) * p.top_k;
    const int64_t atoms = NumAtoms(rows, p.num_experts);
    plan13 = Plan::At(arena.Take<uint8_t>(Plan::kBytes));
    plan2 = Plan::At(arena.Take<uint8_t>(Plan::kBytes));
    block_counts = arena.Take<int>((rows + kRoutePairs - 1) / kRoutePairs * p.num_experts);
    group_sizes = arena.Take<int>(p.num_experts);
    row_of_pair = arena.Take<int>(rows);
    pair_of_row = arena.Take<int>(rows);
    x_scale = arena.Take<float>(rows);
    h_scale = arena.Take<float>(rows);
    h_amax_bits = arena.Take<uint32_t>(rows);
    x_image = arena.Take<uint8_t>(atoms * p.w13_k_blocks * 1024);
    h_image = arena.Take<uint8_t>(atoms * p.w2_k_blocks * 1024);
    h = arena.Take<__nv_bfloat16>(rows * p.w13_row_blocks * 32);
    slots = arena.Take<__nv_bfloat16>(rows * p.hidden_size);
    bytes = arena.used();
  }
};

void LaunchChunk(const FusedMoeParams& p, const Workspace& ws, int64_t first_token, int num_tokens,
                 int num_sms, cudaStream_t stream) {
  const int num_experts = static_cast<int>(p.num_experts), top_k = static_cast<int>(p.top_k);
  const int num_pairs = num_tokens * top_k;
  const int num_blocks = (num_pairs + kRoutePairs - 1) / kRoutePairs;
  const int num_atoms = static_cast<int>(NumAtoms(num_pairs, num_experts));
  const int warpgroups = TileWarpgroups(p.tile_tokens);
  const int tile_tokens = static_cast<int>(p.tile_tokens);
  const int hidden = static_cast<int>(p.hidden_size);
  const int width = static_cast<int>(p.w13_row_blocks) * 32;
  const int* ids = p.topk_ids + first_token * top_k;
  auto row_tiles = [&](int64_t row_blocks) {
    return static_cast<int>((row_blocks + warpgroups - 1) / warpgroups);
  };

  CountPairs<<<num_blocks, kRoutePairs, 0, stream>>>(ids, num_pairs, num_experts, ws.block_counts);
  ScanBlocks<<<(num_experts + 127) / 128, 128, 0, stream>>>(ws.block_counts, num_blocks,
                                                            num_experts, ws.group_sizes);
  LaunchPlanGroups(ws.group_sizes, num_experts, num_pairs, tile_tokens, row_tiles(p.w13_row_blocks),
                   ws.plan13, stream);
  LaunchPlanGroups(ws.group_sizes, num_experts, num_pairs, tile_tokens, row_tiles(p.w2_row_blocks),
                   ws.plan2, stream);
  RankPairs<<<num_blocks, kRoutePairs, 0, stream>>>(ids, num_pairs, num_experts, ws.block_counts,
                                                    ws.plan13, ws.row_of_pair, ws.pair_of_row,
                                                    ws.h_amax_bits);
  LaunchWriteTokenImage(static_cast<const uint8_t*>(p.x) + first_token * hidden, ws.x_image,
                        num_experts, hidden, num_atoms, ws.plan13,
                        {ws.pair_of_row, top_k, p.x_scale + first_token, ws.x_scale}, stream);
  LaunchGroupedGemm(p.tile_tokens,
                    GroupedGemmParams{static_cast<const uint8_t*>(p.w13), ws.x_image, ws.plan13,
                                      num_experts, static_cast<int>(p.w13_row_blocks),
                                      static_cast<int>(p.w13_k_blocks), num_atoms},
                    SwiGlu{ws.h, ws.h_amax_bits, ws.x_scale, p.w13_bias,
                           static_cast<int>(p.w13_row_blocks), p.alpha, p.beta, p.limit},
                    num_sms, stream);
  LaunchQuantizeTokenImage(ws.h, ws.h_amax_bits, ws.h_image, ws.h_scale, num_experts, width,
                           num_atoms, ws.plan2, stream);
  LaunchGroupedGemm(p.tile_tokens,
                    GroupedGemmParams{static_cast<const uint8_t*>(p.w2), ws.h_image, ws.plan2,
                                      num_experts, static_cast<int>(p.w2_row_blocks),
                                      static_cast<int>(p.w2_k_blocks), num_atoms},
                    ScaledStore<__nv_bfloat16>{ws.slots, ws.h_scale, p.w2_bias, hidden, false},
                    num_sms, stream);
  CombineSlots<<<num_tokens, kCombineThreads, 0, stream>>>(
      ws.slots, ws.row_of_pair, p.topk_weights + first_token * top_k, top_k, hidden,
      static_cast<__nv_bfloat16*>(p.y) + first_token * hidden);
}

}  // namespace

int64_t FusedMoeWorkspaceBytes(const FusedMoeParams& p) { return Workspace(p, nullptr).bytes; }

cudaError_t PrepareFusedMoe() {
  const cudaError_t status = PrepareGroupedGemm<SwiGlu>();
  return status == cudaSuccess ? PrepareGroupedGemm<ScaledStore<__nv_bfloat16>>() : status;
}

cudaError_t LaunchFusedMoe(const FusedMoeParams& p, cudaStream_t stream) {
  if (p.num_tokens == 0) return cudaSuccess;
  int num_sms = 0;
  const cudaError_t status = NumSms(&num_sms);
  if (status != cudaSuccess) return status;
  const Workspace ws(p, p.workspace);
  const int64_t chunk = ChunkTokens(p);
  for (int64_t first = 0; first < p.num_tokens; first += chunk) {
    LaunchChunk(p, ws, first, static_cast<int>(std::min(chunk, p.num_tokens - first)), num_sms,
                stream);
  }
  return cudaGetLastError();
}

}  // namespace jax_w4moe
