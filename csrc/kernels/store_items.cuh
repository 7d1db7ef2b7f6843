// The storing warps of the grouped GEMM: one for each warpgroup that multiplies, which stages its
// results in shared memory for it.
#pragma once

#include <cstdint>

#include "epilogue/epilogue.cuh"
#include "ptx/sm90.cuh"
#include "schedule/rows.cuh"

namespace jax_w4moe {

inline constexpr int kNoMoreJobs = -1;  // as a job's live

// Where a warpgroup stages its sub-tiles, in turn, for the warp that stores them.
template <typename Tile>
struct Staging {
  uint32_t shared;  // of the CTA
  int warpgroup;

  __device__ __forceinline__ int Index(int job) const {
    return warpgroup * Tile::kBuffers + job % Tile::kBuffers;
  }
  __device__ __forceinline__ uint32_t At(int job) const {
    return shared + Tile::kStagingAt + Index(job) * Tile::kStagingBytes;
  }
  __device__ __forceinline__ volatile StoreJob& Job(uint8_t* base, int job) const {
    return reinterpret_cast<StoreJob*>(base + Tile::kJobsAt)[Index(job)];
  }
  // Barriers: staged by all threads of the warpgroup, drained by those of the warp.
  __device__ __forceinline__ uint32_t Staged(int job) const {
    return shared + Tile::kBarriersAt + 16 * (Tile::kStages + Index(job));
  }
  __device__ __forceinline__ uint32_t Drained(int job) const { return Staged(job) + 8; }
  __device__ __forceinline__ void WaitStaged(int job) const {
    ptx::BarrierWait(Staged(job), job / Tile::kBuffers & 1);
  }
  // For the last job that the place of this one was used for.
  __device__ __forceinline__ void WaitDrained(int job) const {
    ptx::BarrierWait(Drained(job), (job / Tile::kBuffers & 1) ^ 1);
  }
};

// A warp that stores what its warpgroup stages, and counts slabs, where there are counts.
template <typename Tile>
__device__ __forceinline__ void StoreItems(const Epilogue& epilogue, int* counts, uint8_t* base,
                                           const Staging<Tile>& staging) {
  for (int number = 0;; ++number) {
    volatile const StoreJob& job = staging.Job(base, number);
    staging.WaitStaged(number);
    // Known to be uniform: a divergent exit costs the warpgroups that multiply registers.
    const int live = ptx::Uniform(job.live);
    if (live == kNoMoreJobs) return;
    const int finishes = job.finishes;
    epilogue.StoreJob(job.first_row, job.slab, live, staging.At(number));
    ptx::BarrierArrive(staging.Drained(number));
    if (counts) {
      __syncwarp();
      ptx::AddOneRelease(counts + finishes, threadIdx.x % 32 == 0 && finishes != kNoExpert);
    }
  }
}

}  // namespace jax_w4moe
