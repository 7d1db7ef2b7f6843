// The ring of stages in shared memory that a producer fills and the others empty.
#pragma once

#include <cstdint>

#include "ptx/sm90.cuh"

namespace jax_w4moe {

// Lanes of a warp that arrive for it. One is enough after __syncwarp, and fastest; but
// compute-sanitizer's racecheck does not follow the other lanes through it (`make sanitize`).
#ifdef JAX_W4MOE_RACECHECK
inline constexpr int kArrivingLanes = 32;
#else
inline constexpr int kArrivingLanes = 1;
#endif

// Arrives for a warp, all of whose lanes have read or written.
__device__ __forceinline__ void WarpArrive(uint32_t mbarrier) {
  __syncwarp();
  if (threadIdx.x % 32 < kArrivingLanes) ptx::BarrierArrive(mbarrier);
}

// Where one is in the ring: a stage, and the parity to wait for. A producer begins with parity 1,
// since stages are empty at first.
template <int kStages>
struct RingPlace {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void Advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

}  // namespace jax_w4moe
