// What becomes of a finished tile, by a parameter: the grouped GEMMs of a layer and grouped_matmul
// are one kernel then, and the second launch of a layer finds its instructions in the caches.
#pragma once

#include "epilogue/gated.cuh"
#include "epilogue/scaled_store.cuh"
#include "epilogue/tile.cuh"

namespace jax_w4moe {

enum class EpilogueKind { kGated, kStore, kStoreF32 };

struct Epilogue {
  EpilogueKind kind;
  Gated gated;
  ScaledStore store;

  // Whether results go through shared memory: Finish stages them, and another warp stores them.
  __device__ __forceinline__ bool IsStaged() const { return kind != EpilogueKind::kStoreF32; }

  template <int kTokens>
  __device__ __forceinline__ void Finish(float (&acc)[kTokens / 2],
                                         const EpilogueTile& tile) const {
    if (kind == EpilogueKind::kGated) {
      gated.template Stage<kTokens>(acc, tile);
      return;
    }
    store.template Scale<kTokens>(acc, tile);
    if (IsStaged()) {
      store.template Stage<kTokens>(acc, tile);
    } else {
      store.template Store<kTokens>(acc, tile);
    }
  }
  // A warp stores what was staged of a job.
  __device__ __forceinline__ void StoreJob(int64_t row, int slab, int live,
                                           uint32_t staging) const {
    if (kind == EpilogueKind::kGated) {
      StoreBy(gated, row, slab, live, staging);
    } else {
      StoreBy(store, row, slab, live, staging);
    }
  }

 private:
  template <typename Which>
  static __device__ __forceinline__ void StoreBy(const Which& which, int64_t row, int slab,
                                                 int live, uint32_t staging) {
    constexpr int kChunks = Which::kChunks;
    const StoreTarget target = which.Target(row, slab, threadIdx.x % kChunks);
    if (target.to) StoreStaged<kChunks>(staging, live, target);
  }
};

}  // namespace jax_w4moe
