// From expert ids to rows sorted by (expert, token, slot), the same in every run: counts per block
// of pairs, a scan over blocks, then ranks within each block. No order depends on timing.
#pragma once

#include <cstdint>

#include "schedule/grouped.cuh"

namespace jax_w4moe {

inline constexpr int kRoutePairs = 1024;  // (token, slot) pairs per block, one per thread

// block_counts[block, expert]: pairs of the block that go to the expert. Ids outside [0, E) go
// nowhere.
__global__ void __launch_bounds__(kRoutePairs)
    CountPairs(const int* __restrict__ topk_ids, int num_pairs, int num_experts,
               int* __restrict__ block_counts) {
  __shared__ int counts[kMaxExperts];
  for (int e = threadIdx.x; e < num_experts; e += kRoutePairs) counts[e] = 0;
  __syncthreads();
  const int pair = blockIdx.x * kRoutePairs + threadIdx.x;
  const int expert = pair < num_pairs ? topk_ids[pair] : -1;
  if (expert >= 0 && expert < num_experts) atomicAdd(&counts[expert], 1);  // integers: exact
  __syncthreads();
  for (int e = threadIdx.x; e < num_experts; e += kRoutePairs) {
    block_counts[int64_t{blockIdx.x} * num_experts + e] = counts[e];
  }
}

// Turns block_counts into the pairs of earlier blocks, and gives the totals. One thread per expert.
__global__ void ScanBlocks(int* __restrict__ block_counts, int num_blocks, int num_experts,
                           int* __restrict__ group_sizes) {
  const int expert = blockIdx.x * blockDim.x + threadIdx.x;
  if (expert >= num_experts) return;
  int total = 0;
  for (int block = 0; block < num_blocks; ++block) {
    int& entry = block_counts[int64_t{block} * num_experts + expert];
    const int count = entry;
    entry = total;
    total += count;
  }
  group_sizes[expert] = total;
}

// row_of_pair[pair]: its row in expert order, or -1; pair_of_row: the inverse. Clears amax_bits,
// one per row, for the first GEMM's epilogue.
__global__ void __launch_bounds__(kRoutePairs)
    RankPairs(const int* __restrict__ topk_ids, int num_pairs, int num_experts,
              const int* __restrict__ block_counts, Plan plan, int* __restrict__ row_of_pair,
              int* __restrict__ pair_of_row, uint32_t* __restrict__ amax_bits) {
  __shared__ int next[kMaxExperts];
  for (int e = threadIdx.x; e < num_experts; e += kRoutePairs) {
    next[e] = plan.row_start[e] + block_counts[int64_t{blockIdx.x} * num_experts + e];
  }
  const int pair = blockIdx.x * kRoutePairs + threadIdx.x, lane = threadIdx.x % 32;
  const int id = pair < num_pairs ? topk_ids[pair] : -1;
  const int expert = id >= 0 && id < num_experts ? id : -1;
  const unsigned same = __match_any_sync(~0u, expert);
  const int rank = __popc(same & ((1u << lane) - 1));
  int row = -1;
  // Warps take their rows in order; within a warp the rank decides.
  for (int warp = 0; warp < kRoutePairs / 32; ++warp) {
    __syncthreads();
    if (threadIdx.x / 32 == warp) {
      if (expert >= 0) row = next[expert] + rank;
      __syncwarp();
      if (expert >= 0 && rank == 0) next[expert] += __popc(same);
    }
  }
  if (pair < num_pairs) {
    row_of_pair[pair] = row;
    amax_bits[pair] = 0;  // as many rows as pairs, at most
  }
  if (row >= 0) pair_of_row[row] = pair;
}

}  // namespace jax_w4moe
