// The ring of stages in shared memory that a producer fills and the others empty.
#pragma once

#include <cstdint>

namespace jax_w4moe {

// Lanes of a warp that say it has read a stage. One is enough after __syncwarp, and fastest; but
// compute-sanitizer's racecheck does not follow the other lanes through it (`make sanitize`).
#ifdef JAX_W4MOE_RACECHECK
inline constexpr int kReleasingLanes = 32;
#else
inline constexpr int kReleasingLanes = 1;
#endif

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
