// Which tile a persistent CTA works on next: (expert, row slabs, token tile) from group sizes that
// only the device knows. A CTA begins with the item of its own number; later ones it takes by
// ticket, so that none waits for a slower one. Which CTA does an item changes no bit of it.
//
// An expert's rows are cut into as few token tiles as fit, as equal as whole units of tokens allow.
// Work items are numbered expert by expert, token tiles next, row slabs fastest, so that CTAs that
// run side by side read the same tokens; an expert's weights stay in L2 for its next token tile.
#pragma once

#include <climits>
#include <cstdint>

#include "schedule/plan.h"

namespace jax_w4moe {

// A plan made by a warp from few pairs' expert ids, as the one in memory will be: one tile per
// expert.
class PlanOfFew {
 public:
  __device__ __forceinline__ explicit PlanOfFew(const FewPairs& pairs) {
    const int lane = threadIdx.x % 32;
    const int id = lane < pairs.num_pairs ? pairs.expert_ids[lane] : -1;
    const bool valid = id >= 0 && id < pairs.num_experts;
    const unsigned same = __match_any_sync(~0u, valid ? id : -1);
    const unsigned firsts = __ballot_sync(~0u, valid && (same & ((1u << lane) - 1)) == 0);
    num_tiles = __popc(firsts);
    own_ = {id, 0, __popc(same), 0};
    for (int other = 0; other < pairs.num_pairs; ++other) {
      const int its = __shfl_sync(~0u, valid ? id : pairs.num_experts, other);
      own_.row_start += its < id;
      own_.first_tile += its < id && (firsts >> other & 1);
    }
    if (!(firsts >> lane & 1)) own_.first_tile = -1;
  }
  // The same in all lanes.
  __device__ __forceinline__ PlannedTile Tile(int tile) const {
    const int lane = max(__ffs(__ballot_sync(~0u, own_.first_tile == tile)) - 1, 0);
    return {__shfl_sync(~0u, own_.expert, lane), __shfl_sync(~0u, own_.row_start, lane),
            __shfl_sync(~0u, own_.size, lane), tile};
  }
  int num_tiles;

 private:
  PlannedTile own_;  // of the lane's pair, if it is the first of its expert
};

// A work item: `live` tokens from `first_row` on, times `slabs` slabs from `first_slab` on.
struct WorkItem {
  int expert;
  int first_slab;
  int slabs;
  int64_t first_row;
  int live;
  int width;  // tokens of a sub-tile
};

// How the slabs of a matrix are dealt out: `group` of them, a warpgroup each, to a row tile.
struct RowTiles {
  int row_blocks, group, count;

  RowTiles() = default;

  static __device__ __forceinline__ int Count(int things, int of_each) {
    return (things + of_each - 1) / of_each;
  }

  // As many slabs as there are warpgroups; where that makes few waves of items, the group that
  // leaves the SMs idle least. One slab alone takes as long as one and a half: its warpgroup waits
  // for its own results.
  __device__ __forceinline__ RowTiles(int row_blocks, int most, int num_tiles, int num_sms)
      : row_blocks(row_blocks), group(most), count(Count(row_blocks, most)) {
    constexpr int kFewWaves = 3;
    if (num_tiles * count > kFewWaves * num_sms) return;
    int best = INT_MAX;
    for (int g = most; g > 0; --g) {
      const int waves = Count(num_tiles * Count(row_blocks, g), num_sms);
      const int time = waves * max(2 * g, 3);
      if (time < best) {
        best = time;
        group = g;
      }
    }
    count = Count(row_blocks, group);
  }
};

// Tile: kSubtiles, kTokens, kMinWidth. `planned` is tile item / rows.count of the plan.
template <typename Tile>
__device__ __forceinline__ WorkItem ItemAt(const PlannedTile& planned, const RowTiles& rows,
                                           int item) {
  constexpr int kUnit = 8 * Tile::kSubtiles;  // tokens; tiles are whole units
  WorkItem result;
  const int tiles = (planned.size + Tile::kTokens - 1) / Tile::kTokens;
  const int local = item - planned.first_tile * rows.count;
  const int units = (planned.size + kUnit - 1) / kUnit;
  int row_tile = local, tile = 0, least = units, longer = 0;
  if (tiles > 1) {  // divisions take time
    row_tile = local % rows.count;
    tile = local / rows.count;
    least = units / tiles;
    longer = units % tiles;  // the first tiles have one more
  }
  const int first = (tile * least + min(tile, longer)) * kUnit;
  const int own = least + (tile < longer);
  result.width = max(own * 8, Tile::kMinWidth);
  result.expert = planned.expert;
  result.first_slab = row_tile * rows.group;
  result.slabs = min(rows.group, rows.row_blocks - result.first_slab);
  result.first_row = int64_t{planned.row_start} + first;
  result.live = min(planned.size - first, own * kUnit);
  return result;
}

}  // namespace jax_w4moe
