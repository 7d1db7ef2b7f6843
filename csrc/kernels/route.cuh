// From expert ids to rows sorted by (expert, token, slot), the same in every run: no order depends
// on timing. Few pairs are placed by counting, where their rows are written (token_image.cuh); many
// by the two kernels here: counts per block of pairs, then ranks within each block.
//
// An id outside [0, E) goes nowhere; its pair takes a row behind all experts that nothing reads.
#pragma once

#include <cstdint>

#include "kernels/plan.cuh"
#include "ptx/sm90.cuh"
#include "schedule/plan.h"
#include "schedule/rows.cuh"

namespace jax_w4moe {

inline constexpr int kRoutePairs = 1024;  // (token, slot) pairs per block, one per thread
static_assert(kRoutePairs == kMaxExperts, "RankPairs has one thread per expert too");

__device__ __forceinline__ int ValidExpert(int id, int num_experts) {
  return id >= 0 && id < num_experts ? id : num_experts;
}

// block_counts[block, e]: pairs of the block that go to expert e; e = E counts those of no expert.
__global__ void __launch_bounds__(kRoutePairs)
    CountPairs(const int* __restrict__ topk_ids, int num_pairs, int num_experts,
               int* __restrict__ block_counts) {
  __shared__ int counts[kMaxExperts + 1];
  for (int e = threadIdx.x; e <= num_experts; e += kRoutePairs) counts[e] = 0;
  __syncthreads();
  const int pair = blockIdx.x * kRoutePairs + threadIdx.x;
  if (pair < num_pairs) {
    atomicAdd(&counts[ValidExpert(topk_ids[pair], num_experts)], 1);  // integers: exact
  }
  __syncthreads();
  for (int e = threadIdx.x; e <= num_experts; e += kRoutePairs) {
    block_counts[int64_t{blockIdx.x} * (num_experts + 1) + e] = counts[e];
  }
}

// places[pair], the tags of their rows, and the plan.
__global__ void __launch_bounds__(kRoutePairs)
    RankPairs(const int* __restrict__ topk_ids, int num_pairs, int num_experts, int tile_tokens,
              const int* block_counts, Plan plan, Place* places, int* row_tags) {
  using Builder = PlanBuilder<kRoutePairs>;
  __shared__ Builder::Shared scratch;
  __shared__ int first[kMaxExperts + 1], next[kMaxExperts + 1];
  ptx::WaitForPrecedingKernels();
  ptx::LaunchDependents();
  const int lane = threadIdx.x % 32, stride = num_experts + 1;
  int size[1] = {0}, start[1], before = 0;
  if (threadIdx.x < num_experts) {
    for (int block = 0; block < gridDim.x; ++block) {
      const int count = block_counts[int64_t{block} * stride + threadIdx.x];
      size[0] += count;
      before += block < blockIdx.x ? count : 0;
    }
  }
  const int total = Builder::Starts(scratch, size, start);
  if (threadIdx.x < num_experts) {
    first[threadIdx.x] = start[0];
    next[threadIdx.x] = start[0] + before;
  }
  if (threadIdx.x < 32) {  // those of no expert
    int nowhere = 0;
    for (int block = lane; block < blockIdx.x; block += 32) {
      nowhere += block_counts[int64_t{block} * stride + num_experts];
    }
    nowhere = __reduce_add_sync(~0u, nowhere);
    if (lane == 0) next[num_experts] = total + nowhere;
  }
  if (blockIdx.x == 0) Builder::Write(scratch, size, start, num_experts, tile_tokens, plan);

  const int pair = blockIdx.x * kRoutePairs + threadIdx.x;
  const int expert = pair < num_pairs ? ValidExpert(topk_ids[pair], num_experts) : -1;
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
    const int phase = expert < num_experts ? (row - first[expert]) % 8 : -1;
    places[pair] = {row, phase};
    row_tags[row] = RowTag(expert, phase);
  }
}

}  // namespace jax_w4moe
