// One of two epilogues, by a parameter: the grouped GEMMs of a layer are one kernel then, and the
// second launch finds its instructions in the caches.
#pragma once

#include "epilogue/tile.cuh"

namespace jax_w4moe {

template <typename First, typename Second>
struct Either {
  First first;
  Second second;
  bool is_second;

  static constexpr bool kStaged = true;

  template <int kTokens>
  __device__ __forceinline__ void Stage(float (&acc)[kTokens / 2], const EpilogueTile& tile) const {
    if (is_second) {
      second.template Stage<kTokens>(acc, tile);
    } else {
      first.template Stage<kTokens>(acc, tile);
    }
  }
  // A warp stores what was staged of a job.
  __device__ __forceinline__ void Store(int64_t row, int slab, int live, uint32_t staging) const {
    if (is_second) {
      StoreBy(second, row, slab, live, staging);
    } else {
      StoreBy(first, row, slab, live, staging);
    }
  }

 private:
  template <typename Epilogue>
  static __device__ __forceinline__ void StoreBy(const Epilogue& epilogue, int64_t row, int slab,
                                                 int live, uint32_t staging) {
    constexpr int kChunks = Epilogue::kChunks;
    const StoreTarget target = epilogue.Target(row, slab, threadIdx.x % kChunks);
    if (target.to) StoreStaged<kChunks>(staging, live, target);
  }
};

}  // namespace jax_w4moe
