// Which tile a persistent CTA works on next: (expert, row slabs, token tile) from group sizes that
// only the device knows. A CTA begins with the item of its own number; later ones it takes by
// ticket, so that none waits for a slower one. Which CTA does an item changes no bit of it.
//
// An expert's rows are cut into as few token tiles as fit, all of one width. Work items are
// numbered expert by expert, row slabs next, token tiles fastest, so that the token tiles of one
// expert's slabs run side by side and find the weights in L2.
#pragma once

#include <cstdint>

#include "common/limits.h"

namespace jax_w4moe {

// Per-expert numbers in global memory. int32: rows per call are bounded by the caller.
struct Plan {
  int* row_start;   // [E] first row of the expert in the token image, the scales and the output
  int* size;        // [E] its rows
  int* tile_start;  // [E + 1] token tiles of the experts before
  int* tickets;     // [kTickets] for each grouped GEMM, how many items beyond the first are taken

  static constexpr int kTickets = 2;
  static constexpr int64_t kBytes = 12416;

  __host__ __device__ static Plan At(void* workspace) {
    int* p = static_cast<int*>(workspace);
    return {p, p + kMaxExperts, p + 2 * kMaxExperts, p + 3 * kMaxExperts + 1};
  }
};
static_assert(Plan::kBytes % 128 == 0, "what follows the plan is aligned");
static_assert(Plan::kBytes >= 4 * (3 * kMaxExperts + 1 + Plan::kTickets), "all arrays");

// A plan in shared memory.
struct SharedPlan {
  int row_start[kMaxExperts];
  int size[kMaxExperts];
  int tile_start[kMaxExperts + 1];

  __device__ __forceinline__ void Load(const Plan& plan, int num_experts, int thread, int threads) {
    for (int e = thread; e < num_experts; e += threads) {
      row_start[e] = plan.row_start[e];
      size[e] = plan.size[e];
    }
    for (int e = thread; e <= num_experts; e += threads) tile_start[e] = plan.tile_start[e];
  }
};

// A work item: `live` tokens from `first_row` on, times the slabs from `first_slab` on.
struct WorkItem {
  int expert;
  int first_slab;
  int64_t first_row;
  int live;
  int width;  // tokens of a sub-tile
};

// The last index i in [0, count) with starts[i] * factor <= value; starts rise from 0 on.
__device__ __forceinline__ int LastNotAbove(const int* starts, int count, int factor, int value) {
  int low = 0, high = count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (starts[middle] * factor <= value) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// Tile: kWarpgroups, kSubtiles and RoundWidth(tokens of a sub-tile).
template <typename Tile>
__device__ __forceinline__ WorkItem ItemAt(const SharedPlan& plan, int num_experts, int row_tiles,
                                           int item) {
  WorkItem result;
  const int expert = LastNotAbove(plan.tile_start, num_experts, row_tiles, item);
  const int size = plan.size[expert];
  const int tiles = plan.tile_start[expert + 1] - plan.tile_start[expert];
  const int local = item - plan.tile_start[expert] * row_tiles;
  const int cut = tiles * Tile::kSubtiles;
  result.width = Tile::RoundWidth((size + cut - 1) / cut);
  const int first = local % tiles * (result.width * Tile::kSubtiles);
  result.expert = expert;
  result.first_slab = local / tiles * Tile::kWarpgroups;
  result.first_row = int64_t{plan.row_start[expert]} + first;
  result.live = min(size - first, result.width * Tile::kSubtiles);
  return result;
}

}  // namespace jax_w4moe
