// Zeros in the rows that belong to no expert.
#pragma once

#include <cstdint>

#include "schedule/grouped.cuh"

namespace jax_w4moe {

// Rows of no expert are zero.
template <typename Out>
__global__ void ZeroTail(Out* __restrict__ out, int64_t num_rows, int64_t width, int num_experts,
                         Plan plan) {
  const int last = num_experts - 1;
  const int64_t begin = (int64_t{plan.row_start[last]} + plan.size[last]) * width;
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = begin + blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < num_rows * width;
       i += step) {
    out[i] = Out(0.0f);
  }
}

}  // namespace jax_w4moe
