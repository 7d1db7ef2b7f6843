// Writes rows as a token image. The kernel has two policies: the Source says what a row holds
// (bf16, quantised here or split in two; or E4M3), the Placement where it goes: to k rows after
// routing, or to its own.
#pragma once

#include <cstdint>

#include "kernels/plan.cuh"
#include "kernels/route.cuh"
#include "kernels/row_sources.cuh"
#include "ptx/sm90.cuh"
#include "schedule/plan.h"
#include "schedule/rows.cuh"

namespace jax_w4moe {

inline constexpr int kImageThreads = 128;

template <int kTeam>
__device__ __forceinline__ void SyncTeam() {
  if constexpr (kTeam <= 32) {
    __syncwarp(TeamLanes<kTeam>());
  } else {
    __syncthreads();
  }
}

// --- placements ---
//
// kTeam: the threads of a row (quantize_row.cuh). kKept: chunks that each of them reads once; wider
//   rows are read twice. kBlocks: for __launch_bounds__, or 0.
// HasRow: whether the row goes anywhere; asked before the preceding kernel is complete.
// Wait: until the row of the source is there. Done: it has been written, by all threads.
// kLaunchFirst: the next kernel may start before the preceding one is complete. It may not where it
//   takes a plan for granted that the preceding one makes.

inline constexpr int kMaxCountedPairs = 2048;  // more are placed by route.cuh's kernels

// Of placements whose source the preceding kernels have written when they are complete.
struct AfterPrecedingKernels {
  static constexpr int kTeam = kImageThreads;
  static constexpr int kKept = 4;
  static constexpr int kBlocks = 6;
  __device__ __forceinline__ void Wait(int) const { ptx::WaitForPrecedingKernels(); }
  __device__ __forceinline__ void Done(int) const {}
};

// Few tokens to the rows of their experts, by counting: the row of a pair is the number of pairs
// with a smaller expert, or with the same expert and an earlier place. One more block writes the
// plan.
struct PlaceByCounting : AfterPrecedingKernels {
  const int* topk_ids;  // [num_pairs]
  int num_pairs, top_k, num_experts, tile_tokens;
  Plan plan;
  Place* places;  // [num_pairs], written
  int* row_tags;  // [num_pairs], written

  using Builder = PlanBuilder<kImageThreads>;
  static constexpr bool kLaunchFirst = true;
  union Shared {
    Place place[kMaxTopK];
    struct {
      int count[kMaxExperts + 1];
      Builder::Shared scratch;
    } build;
  };

  __device__ __forceinline__ int Count() const { return top_k; }
  __device__ __forceinline__ bool HasRow(int token) const { return token * top_k < num_pairs; }
  __device__ __forceinline__ bool Begin(Shared& shared, int token) const {
    if (!HasRow(token)) {
      BuildPlan(shared);
      return false;
    }
    const int lane = threadIdx.x % 32;
    for (int slot = threadIdx.x / 32; slot < top_k; slot += kImageThreads / 32) {
      const int pair = token * top_k + slot;
      const int expert = ValidExpert(topk_ids[pair], num_experts);
      int smaller = 0, earlier = 0;
      for (int other = lane; other < num_pairs; other += 32) {
        const int its = ValidExpert(topk_ids[other], num_experts);
        smaller += its < expert;
        earlier += its == expert && other < pair;
      }
      smaller = __reduce_add_sync(~0u, smaller);
      earlier = __reduce_add_sync(~0u, earlier);
      if (lane == 0) {
        const int row = smaller + earlier, phase = expert < num_experts ? earlier % 8 : -1;
        shared.place[slot] = places[pair] = {row, phase};
        row_tags[row] = RowTag(expert, phase);
      }
    }
    __syncthreads();
    return true;
  }
  __device__ __forceinline__ Place At(const Shared& shared, int, int slot) const {
    return shared.place[slot];
  }

 private:
  __device__ __forceinline__ void BuildPlan(Shared& shared) const {
    int (&count)[kMaxExperts + 1] = shared.build.count;
    for (int e = threadIdx.x; e <= kMaxExperts; e += kImageThreads) count[e] = 0;
    __syncthreads();
    for (int pair = threadIdx.x; pair < num_pairs; pair += kImageThreads) {
      const int expert = ValidExpert(topk_ids[pair], num_experts);
      if (expert < num_experts) atomicAdd(&count[expert], 1);  // integers: exact
    }
    __syncthreads();
    int size[Builder::kItems], start[Builder::kItems];
#pragma unroll
    for (int i = 0; i < Builder::kItems; ++i) size[i] = count[threadIdx.x * Builder::kItems + i];
    Builder::Starts(shared.build.scratch, size, start);
    Builder::Write(shared.build.scratch, size, start, num_experts, tile_tokens, plan);
  }
};

// Tokens to the rows that RankPairs gave them.
struct PlaceByTable : AfterPrecedingKernels {
  const Place* places;  // [tokens, top_k]
  int top_k;

  static constexpr bool kLaunchFirst = false;
  struct Shared {};

  __device__ __forceinline__ int Count() const { return top_k; }
  __device__ __forceinline__ bool HasRow(int) const { return true; }
  __device__ __forceinline__ bool Begin(Shared&, int) const { return true; }
  __device__ __forceinline__ Place At(const Shared&, int token, int slot) const {
    return places[token * top_k + slot];
  }
};

// Rows of h, which stay where they are. An expert's rows are taken as soon as the grouped GEMM that
// writes them says that they are there, and handed to the next one by a count as well, so that an
// expert need not wait for all others. That GEMM's CTAs have all begun when this kernel begins, and
// this kernel's blocks when the next GEMM begins: who waits does so for somebody at work.
template <int kTeam_>
struct PlaceInPlace {
  Handover from;
  int num_rows;

  static constexpr int kTeam = kTeam_;
  static constexpr int kKept = kTeam == 32 ? 6 : kTeam < 32 ? 4 : 2;
  // Beside the GEMM that writes h there is room for one block of 80 registers, or two of 48.
  static constexpr int kBlocks = kTeam <= 32 ? 6 : 0;
  static constexpr bool kLaunchFirst = true;
  struct Shared {};

  __device__ __forceinline__ int Count() const { return 1; }
  __device__ __forceinline__ bool HasRow(int row) const {
    return row < num_rows && from.row_tags[row] != kNoExpert;
  }
  __device__ __forceinline__ void Wait(int row) const {
    if (!from.by_counts) return ptx::WaitForPrecedingKernels();
    if (HasRow(row) && threadIdx.x % kTeam == 0) {
      const int expert = TagExpert(from.row_tags[row]);
      const int tiles = (from.plan.size[expert] + from.tile_tokens - 1) / from.tile_tokens;
      while (ptx::LoadAcquire(from.plan.slabs_done + expert) != tiles * from.slabs) {
        __nanosleep(50);
      }
    }
    SyncTeam<kTeam>();
  }
  __device__ __forceinline__ bool Begin(Shared&, int row) const { return HasRow(row); }
  __device__ __forceinline__ Place At(const Shared&, int row, int) const {
    return {row, TagPhase(from.row_tags[row])};
  }
  __device__ __forceinline__ void Done(int row) const {
    if (!from.by_counts) return;
    SyncTeam<kTeam>();
    if (HasRow(row)) {
      ptx::AddOneRelease(from.plan.rows_ready + TagExpert(from.row_tags[row]),
                         threadIdx.x % kTeam == 0);
    }
    // Who waits for all of this kernel waits for the one before it too.
    if (row + 1 == num_rows) ptx::WaitForPrecedingKernels();
  }
};

// Rows that stay where they are, grouped as a plan says. Rows of no group get a zero row in `out`.
struct PlaceByGroup : AfterPrecedingKernels {
  Plan plan;
  int num_experts;
  int rows_per_expert;  // as in PlanGroups
  int* row_tags;        // written; may be null
  uint8_t* out;         // the op's result
  int64_t out_bytes;    // of a row, a multiple of 16

  static constexpr bool kLaunchFirst = false;
  struct Shared {
    int before[kImageThreads / 32];
    int phase;
  };

  __device__ __forceinline__ int Count() const { return 1; }
  __device__ __forceinline__ bool HasRow(int) const { return true; }
  __device__ __forceinline__ bool Begin(Shared& shared, int row) const {
    int expert;
    if (rows_per_expert) {
      expert = row / rows_per_expert;
    } else {  // the last that starts at or before the row; empty ones share their starts
      int count = 0;
      for (int e = threadIdx.x; e < num_experts; e += kImageThreads) {
        count += plan.row_start[e] <= row;
      }
      count = __reduce_add_sync(~0u, count);
      if (threadIdx.x % 32 == 0) shared.before[threadIdx.x / 32] = count;
      __syncthreads();
      expert = -1;
#pragma unroll
      for (int w = 0; w < kImageThreads / 32; ++w) expert += shared.before[w];
    }
    const int in_expert = row - plan.row_start[expert];
    const bool live = in_expert < plan.size[expert];
    if (threadIdx.x == 0) {
      shared.phase = live ? in_expert % 8 : -1;
      if (row_tags) row_tags[row] = RowTag(expert, shared.phase);
    }
    __syncthreads();
    if (live) return true;
    uint4* zeros = reinterpret_cast<uint4*>(out + row * out_bytes);
    for (int i = threadIdx.x; i < out_bytes / 16; i += kImageThreads) {
      zeros[i] = make_uint4(0, 0, 0, 0);
    }
    return false;
  }
  __device__ __forceinline__ Place At(const Shared& shared, int row, int) const {
    return {row, shared.phase};
  }
};

// The rows of the source, as many as a block has teams.
template <typename Source, typename Placement>
__global__ void __launch_bounds__(kImageThreads, Placement::kBlocks)
    WriteTokenImage(Source source, Placement placement, TokenImage image) {
  __shared__ typename Placement::Shared shared;
  constexpr int kTeam = Placement::kTeam, kKept = Placement::kKept;
  const int row = blockIdx.x * (kImageThreads / kTeam) + threadIdx.x / kTeam;
  const int thread = threadIdx.x % kTeam, chunks = (source.width + 127) / 128 * 8;
  if constexpr (Placement::kLaunchFirst) ptx::LaunchDependents();
  const bool has_row = placement.HasRow(row);
  placement.Wait(row);
  if constexpr (!Placement::kLaunchFirst) ptx::LaunchDependents();
  typename Source::Raw kept[kKept]{};
  if (has_row) {  // before it is known where to: loads take time
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
      const int chunk = thread + i * kTeam;
      if (chunk < chunks) kept[i] = source.Load(row, chunk);
    }
  }
  if (!placement.Begin(shared, row)) return placement.Done(row);
  uint32_t amax_bits = 0;
#pragma unroll
  for (int i = 0; i < kKept; ++i) amax_bits = max(amax_bits, Source::AbsMax(kept[i]));
  for (int chunk = thread + kKept * kTeam; chunk < chunks; chunk += kTeam) {
    amax_bits = max(amax_bits, Source::AbsMax(source.Load(row, chunk)));
  }
  if (source.NeedsAmax()) amax_bits = TeamMax<kTeam>(amax_bits);
  float scale;
  const float inv_scale = source.Finish(row, amax_bits, scale);
  if (thread < placement.Count()) {
    const Place place = placement.At(shared, row, thread);
    if (place.phase >= 0) image.row_scale[place.row] = scale;
  }
  auto write = [&](int chunk, const typename Source::Raw& raw) {
    typename Source::Value value;
    Source::Convert(raw, inv_scale, value);
    for (int slot = 0; slot < placement.Count(); ++slot) {
      const Place place = placement.At(shared, row, slot);
      if (place.phase >= 0) image.Write(place, chunk, value);
    }
  };
#pragma unroll
  for (int i = 0; i < kKept; ++i) {
    const int chunk = thread + i * kTeam;
    if (chunk < chunks) write(chunk, kept[i]);
  }
  for (int chunk = thread + kKept * kTeam; chunk < chunks; chunk += kTeam) {
    write(chunk, source.Load(row, chunk));
  }
  placement.Done(row);
}

}  // namespace jax_w4moe
