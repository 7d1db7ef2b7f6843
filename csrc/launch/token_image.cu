// The launches of token_image.h.
#include <type_traits>

#include "kernels/route.cuh"
#include "kernels/token_image.cuh"
#include "launch/launch.h"
#include "launch/token_image.h"

namespace jax_w4moe {
namespace {

template <typename Placement, typename Launch>
void WithSource(const Rows& rows, const Placement& placement, const TokenImage& image,
                const Launch& launch) {
  const KOrder order = rows.operands.KOrder();
  const Bf16Rows bf16{static_cast<const __nv_bfloat16*>(rows.x), rows.width, order, rows.rule};
  if (rows.x_scale) {
    const Fp8Rows source{static_cast<const uint8_t*>(rows.x), rows.x_scale, rows.width, order};
    launch(WriteTokenImage<Fp8Rows, Placement>, source, placement, image);
  } else if (rows.operands.is_bf16) {
    launch(WriteTokenImage<SplitBf16Rows, Placement>, SplitBf16Rows{bf16}, placement, image);
  } else {
    launch(WriteTokenImage<Bf16Rows, Placement>, bf16, placement, image);
  }
}

}  // namespace

int64_t CountedBlocks(int64_t num_pairs) {
  return num_pairs <= kMaxCountedPairs ? 0 : (num_pairs + kRoutePairs - 1) / kRoutePairs;
}

void LaunchRoute(const Rows& tokens, int num_tokens, const Routing& r, const TokenImage& image,
                 cudaStream_t stream) {
  const int num_pairs = num_tokens * r.top_k;
  const int blocks = static_cast<int>(CountedBlocks(num_pairs));
  if (blocks == 0) {
    const PlaceByCounting placement{{},      r.topk_ids,    num_pairs,
                                    r.top_k, r.num_experts, r.tile_tokens,
                                    r.plan,  r.places,      r.row_tags};
    WithSource(tokens, placement, image, [&](auto kernel, auto... args) {
      kernel<<<num_tokens + 1, kImageThreads, 0, stream>>>(args...);
    });
    return;
  }
  CountPairs<<<blocks, kRoutePairs, 0, stream>>>(r.topk_ids, num_pairs, r.num_experts,
                                                 r.block_counts);
  LaunchDependent(RankPairs, blocks, kRoutePairs, 0, stream, r.topk_ids, num_pairs, r.num_experts,
                  r.tile_tokens, r.block_counts, r.plan, r.places, r.row_tags);
  WithSource(tokens, PlaceByTable{{}, r.places, r.top_k}, image, [&](auto kernel, auto... args) {
    LaunchDependent(kernel, num_tokens, kImageThreads, 0, stream, args...);
  });
}

void LaunchGroup(const Rows& rows, int num_rows, const Groups& g, const TokenImage& image,
                 cudaStream_t stream) {
  PlanGroups<<<1, kMaxExperts, 0, stream>>>(g.group_sizes, g.num_experts, num_rows,
                                            g.rows_per_expert, g.tile_tokens, g.plan);
  const PlaceByGroup placement{{},
                               g.plan,
                               g.num_experts,
                               g.rows_per_expert,
                               g.row_tags,
                               static_cast<uint8_t*>(g.out),
                               g.out_bytes};
  WithSource(rows, placement, image, [&](auto kernel, auto... args) {
    LaunchDependent(kernel, num_rows, kImageThreads, 0, stream, args...);
  });
}

void LaunchRequantize(const Rows& h, int num_rows, const Handover& handover,
                      const TokenImage& image, cudaStream_t stream) {
  auto launch = [&](const auto& placement) {
    constexpr int kRows = kImageThreads / std::decay_t<decltype(placement)>::kTeam;  // of a block
    WithSource(h, placement, image, [&](auto kernel, auto... args) {
      LaunchDependent(kernel, (num_rows + kRows - 1) / kRows, kImageThreads, 0, stream, args...);
    });
  };
  // Few rows have a block each, which is done sooner than a warp. Of many narrow ones a warp takes
  // four, so that enough bytes are on their way at once.
  constexpr int kFewRows = 256, kManyRows = 4096, kNarrow = 512;
  if (num_rows < kFewRows) {
    launch(PlaceInPlace<kImageThreads>{handover, num_rows});
  } else if (num_rows >= kManyRows && h.width <= kNarrow) {
    launch(PlaceInPlace<8>{handover, num_rows});
  } else {
    launch(PlaceInPlace<32>{handover, num_rows});
  }
}

}  // namespace jax_w4moe
