// What a grouped GEMM of one token is given, and which slabs a CTA works on: all that a plan would
// say is in the ids of the token's experts.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "common/scale_rule.h"
#include "formats/formats.h"
#include "formats/record.cuh"

namespace jax_w4moe {

struct OneTokenParams {
  Records weights;
  const int* expert_ids;  // [num_slots], complete before the preceding kernel began
  int num_slots;          // at most 32
  int num_experts;
  const __nv_bfloat16* rows;  // x, the row of all slots, or h: [num_slots, width]
  int width;
  bool is_first;  // of an op's kernels: those before it are other ops'; `rows` is x
  KOrder order;
  ScaleRule rule;
};

// What a CTA works on: consecutive slabs of one slot, or none. Every slot that has an expert has
// the same number of CTAs, one at least. The same in all lanes of a warp.
struct OneTokenShare {
  int slot, expert, first_slab, slabs;

  // What the constructor is given: a load that can be on its way meanwhile.
  static __device__ __forceinline__ int LaneExpert(const OneTokenParams& p) {
    const int lane = threadIdx.x % 32;
    return lane < p.num_slots ? p.expert_ids[lane] : -1;
  }
  __device__ __forceinline__ OneTokenShare(const OneTokenParams& p, int lane_expert) {
    const bool valid = lane_expert >= 0 && lane_expert < p.num_experts;
    const unsigned slots = __ballot_sync(~0u, valid);
    const int before = __popc(slots & ((1u << threadIdx.x % 32) - 1));
    const int ctas = gridDim.x / max(__popc(slots), 1);
    const int which = blockIdx.x / ctas, part = blockIdx.x % ctas;
    slot = __ffs(__ballot_sync(~0u, valid && before == which)) - 1;
    expert = __shfl_sync(~0u, lane_expert, max(slot, 0));
    const int row_blocks = p.weights.row_blocks;
    first_slab = row_blocks * part / ctas;
    slabs = slot < 0 ? 0 : row_blocks * (part + 1) / ctas - first_slab;
  }
};

}  // namespace jax_w4moe
