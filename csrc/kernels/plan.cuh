// Group sizes to the numbers that the other kernels schedule by. One block.
#pragma once

#include <cub/block/block_scan.cuh>

#include "schedule/grouped.cuh"

namespace jax_w4moe {

// Sizes below zero count as zero; rows beyond num_rows do not exist.
__global__ void __launch_bounds__(kMaxExperts)
    PlanGroups(const int* __restrict__ group_sizes, int num_experts, int num_rows, int tile_tokens,
               int row_tiles, Plan plan) {
  using Scan = cub::BlockScan<int64_t, kMaxExperts, cub::BLOCK_SCAN_WARP_SCANS>;
  __shared__ typename Scan::TempStorage scratch;
  const int expert = threadIdx.x;
  const int64_t wanted = expert < num_experts ? max(group_sizes[expert], 0) : 0;
  int64_t start;
  Scan(scratch).ExclusiveSum(min(wanted, int64_t{num_rows}), start);
  start = min(start, int64_t{num_rows});
  const int64_t size = min(wanted, num_rows - start);
  __syncthreads();
  int64_t atom, atoms, item, items;
  Scan(scratch).ExclusiveSum((size + kTokenAtom - 1) / kTokenAtom, atom, atoms);
  __syncthreads();
  Scan(scratch).ExclusiveSum((size + tile_tokens - 1) / tile_tokens * row_tiles, item, items);
  if (expert < num_experts) {
    plan.row_start[expert] = static_cast<int>(start);
    plan.size[expert] = static_cast<int>(size);
    plan.atom_start[expert] = static_cast<int>(atom);
    plan.item_start[expert] = static_cast<int>(item);
  }
  if (expert == 0) {
    plan.atom_start[num_experts] = static_cast<int>(atoms);
    plan.item_start[num_experts] = static_cast<int>(items);
  }
}

}  // namespace jax_w4moe
