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

  // Whether results go through shared memory: staged by the warpgroup, stored by another warp.
  __device__ __forceinline__ bool IsStaged() const { return kind != EpilogueKind::kStoreF32; }

  // Calls f with what finishes a tile, finish(width, acc, tile) with the width as a constant: one
  // branch for all sub-tiles of an item.
  template <typename F>
  __device__ __forceinline__ void WithKind(const F& f) const {
    if (kind == EpilogueKind::kGated && gated.activation.kind == ActivationKind::kSwiGlu) {
      f([&](auto width, auto& acc, const EpilogueTile& tile) {
        gated.template Stage<width>(acc, tile, SwiGlu(gated.activation));
      });
    } else if (kind == EpilogueKind::kGated) {
      f([&](auto width, auto& acc, const EpilogueTile& tile) {
        gated.template Stage<width>(acc, tile, SiTu(gated.activation));
      });
    } else if (IsStaged()) {
      f([&](auto width, auto& acc, const EpilogueTile& tile) {
        store.template Stage<width>(acc, tile);
      });
    } else {
      f([&](auto width, auto& acc, const EpilogueTile& tile) {
        store.template Store<width>(acc, tile);
      });
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
  // One token, without shared memory: a thread's sums of rows g and g + 8, the row's scale, and
  // their biases, which may be asked for long before.
  __device__ __forceinline__ float2 Biases(const EpilogueTile& tile) const {
    return kind == EpilogueKind::kGated ? gated.Biases(tile) : store.Biases(tile);
  }
  __device__ __forceinline__ void StoreOneToken(const float (&sums)[2], float2 biases, float scale,
                                                const EpilogueTile& tile) const {
    if (kind != EpilogueKind::kGated) {
      store.StoreOneToken(sums, biases, scale, tile);
    } else if (gated.activation.kind == ActivationKind::kSwiGlu) {
      gated.StoreOneToken(sums, biases, scale, tile, SwiGlu(gated.activation));
    } else {
      gated.StoreOneToken(sums, biases, scale, tile, SiTu(gated.activation));
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
