// Writes E4M3 rows as the shared-memory image that WGMMA reads: atoms of 8 tokens x 128 bytes with
// the 128-byte swizzle, [K/128][atoms][1024 B], K permuted as in the weights (docs/layout.md).
#pragma once

#include <cstdint>

#include "schedule/grouped.cuh"

namespace jax_w4moe {

inline constexpr int kImageThreads = 128;

// One block per padded row. Rows that pad an expert to whole atoms, and those beyond the last
// expert, are zeros. `hidden_size` (of lhs) is a multiple of 32.
__global__ void __launch_bounds__(kImageThreads)
    WriteTokenImage(const uint8_t* __restrict__ lhs, uint8_t* __restrict__ image, int num_experts,
                    int hidden_size, int num_atoms, Plan plan) {
  const int atom = blockIdx.x / kTokenAtom, token = blockIdx.x % kTokenAtom;
  int64_t row = -1;
  if (atom < plan.atom_start[num_experts]) {
    const int expert = LastNotAbove(plan.atom_start, num_experts, atom);
    const int in_expert = (atom - plan.atom_start[expert]) * kTokenAtom + token;
    if (in_expert < plan.size[expert]) row = plan.row_start[expert] + in_expert;
  }
  const int chunks = (hidden_size + 127) / 128 * 8;
  for (int chunk = threadIdx.x; chunk < chunks; chunk += kImageThreads) {
    const int block = chunk / 8, part = chunk % 8;  // part = 2 * instruction + half
    uint32_t words[4] = {0, 0, 0, 0};
    if (row >= 0) {
#pragma unroll
      for (int t = 0; t < 4; ++t) {
        const int k = block * 128 + 32 * t + 4 * part;
        if (k < hidden_size) {
          words[t] = *reinterpret_cast<const uint32_t*>(lhs + row * hidden_size + k);
        }
      }
    }
    uint8_t* out = image + (int64_t{block} * num_atoms + atom) * 1024 + token * 128;
    *reinterpret_cast<uint4*>(out + ((part ^ token) * 16)) =
        make_uint4(words[0], words[1], words[2], words[3]);
  }
}

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
