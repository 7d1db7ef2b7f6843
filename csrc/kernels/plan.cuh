// Group sizes to the plan that a grouped GEMM is scheduled by.
#pragma once

#include <cub/block/block_scan.cuh>

#include "schedule/plan.h"

namespace jax_w4moe {

// One block of kThreads makes a plan; its thread t holds experts t * kItems and following.
template <int kThreads>
struct PlanBuilder {
  static constexpr int kItems = kMaxExperts / kThreads;
  using Scan = cub::BlockScan<int, kThreads, cub::BLOCK_SCAN_WARP_SCANS>;
  using Shared = typename Scan::TempStorage;

  // The sums of the sizes before each expert, and of all.
  static __device__ __forceinline__ int Starts(Shared& shared, const int (&size)[kItems],
                                               int (&start)[kItems]) {
    int total, copy[kItems];  // CUB takes no const arrays
#pragma unroll
    for (int i = 0; i < kItems; ++i) copy[i] = size[i];
    Scan(shared).ExclusiveSum(copy, start, total);
    __syncthreads();  // `shared` is free again
    return total;
  }

  static __device__ __forceinline__ void Write(Shared& shared, const int (&size)[kItems],
                                               const int (&row_start)[kItems], int num_experts,
                                               int tile_tokens, const Plan& plan) {
    int tiles[kItems], first_tile[kItems];
#pragma unroll
    for (int i = 0; i < kItems; ++i) tiles[i] = (size[i] + tile_tokens - 1) / tile_tokens;
    const int total = Starts(shared, tiles, first_tile);
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int expert = threadIdx.x * kItems + i;
      if (expert >= num_experts) break;
      plan.row_start[expert] = row_start[i];
      plan.size[expert] = size[i];
      plan.slabs_done[expert] = plan.rows_ready[expert] = 0;
      for (int t = first_tile[i]; t < first_tile[i] + tiles[i]; ++t) {
        plan.tiles[t] = {expert, row_start[i], size[i], first_tile[i]};
      }
    }
    if (threadIdx.x == 0) plan.head->num_tiles = total;
    if (threadIdx.x < Plan::kTickets) plan.head->tickets[threadIdx.x] = 0;
  }
};

// Sizes below zero count as zero; rows beyond the ones there are do not exist. With
// rows_per_expert = 0 the groups lie one behind the other in num_rows rows; else expert e has the
// rows from e * rows_per_expert on, of which the first group_sizes[e] count.
__global__ void __launch_bounds__(kMaxExperts)
    PlanGroups(const int* __restrict__ group_sizes, int num_experts, int num_rows,
               int rows_per_expert, int tile_tokens, Plan plan) {
  using Builder = PlanBuilder<kMaxExperts>;
  using WideScan = cub::BlockScan<int64_t, kMaxExperts, cub::BLOCK_SCAN_WARP_SCANS>;
  __shared__ union {
    Builder::Shared narrow;
    typename WideScan::TempStorage wide;
  } shared;
  const int expert = threadIdx.x;
  int size[1] = {expert < num_experts ? max(group_sizes[expert], 0) : 0}, row_start[1];
  if (rows_per_expert) {
    size[0] = min(size[0], rows_per_expert);
    row_start[0] = expert * rows_per_expert;
  } else {
    int64_t start;  // sizes may be anything, their sum as well
    WideScan(shared.wide).ExclusiveSum(int64_t{size[0]}, start);
    __syncthreads();
    row_start[0] = static_cast<int>(min(start, int64_t{num_rows}));
    size[0] = min(size[0], num_rows - row_start[0]);
  }
  Builder::Write(shared.narrow, size, row_start, num_experts, tile_tokens, plan);
}

}  // namespace jax_w4moe
