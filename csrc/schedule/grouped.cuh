// Which tile a persistent CTA works on next: (expert, row slabs, token tile) from group sizes that
// only the device knows.
//
// Work items are numbered expert by expert, row slabs next, token tiles fastest, so that the token
// tiles of one expert's slabs run side by side and find the weights in L2.
#pragma once

#include <cstdint>

#include "common/limits.h"

namespace jax_w4moe {

inline constexpr int kTokenAtom = 8;  // tokens are padded per expert to whole swizzle atoms

// Per-expert numbers, written by the plan kernel; each array has kMaxExperts entries (the last two
// one more). int32: rows per call are bounded by the caller.
struct Plan {
  int* row_start;   // first row of the expert in lhs and out
  int* size;        // its rows
  int* atom_start;  // [E + 1] first atom of the expert in the token image
  int* item_start;  // [E + 1] first work item of the expert

  static constexpr int64_t kBytes = 4 * (kMaxExperts * 4 + 2) + 120;  // a multiple of 128

  __host__ __device__ static Plan At(void* workspace) {
    int* p = static_cast<int*>(workspace);
    return {p, p + kMaxExperts, p + 2 * kMaxExperts, p + 3 * kMaxExperts + 1};
  }
};
static_assert(Plan::kBytes % 128 == 0, "what follows the plan is aligned");

// The last index i in [0, count) with starts[i] <= value; starts rise and starts[0] <= value.
__device__ __forceinline__ int LastNotAbove(const int* starts, int count, int value) {
  int low = 0, high = count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (starts[middle] <= value) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

}  // namespace jax_w4moe
