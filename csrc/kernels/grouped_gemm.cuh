// Grouped GEMM on packed 4-bit records: for the rows of every expert, weights times tokens, handed
// to an epilogue in tiles of 64 rows of weights.
//
// One persistent CTA per SM. A producer warp streams records and token tiles through a ring of
// shared-memory stages by bulk copies; kWarpgroups math warpgroups own 64 rows of weights each,
// decode them in registers, multiply (weights are A, tokens are N) and add every K128 product in
// f32; a warp for each of them stores what it has staged. The next record is decoded while this one
// multiplies, and serves kSubtiles token tiles. docs/numerics.md: R2, R5.
#pragma once

#include <cutlass/arch/reg_reconfig.h>

#include <type_traits>

#include "epilogue/tile.cuh"
#include "formats/mxfp4.cuh"
#include "mainloop/wgmma.cuh"
#include "schedule/items.cuh"

namespace jax_w4moe {

// Packed weights of all experts: [E, row_blocks, k_blocks, kRecordBytes].
struct Records {
  const uint8_t* data;
  int row_blocks;
  int k_blocks;

  __device__ __forceinline__ int64_t SlabBytes() const { return int64_t{k_blocks} * kRecordBytes; }
  __device__ __forceinline__ const uint8_t* Slab(int expert, int slab) const {
    return data + (int64_t{expert} * row_blocks + slab) * SlabBytes();
  }
};

struct GroupedGemmParams {
  Records weights;
  const uint8_t* image;    // token image, [k_blocks][image_rows][128]
  const float* row_scale;  // [image_rows]
  Plan plan;
  int64_t image_rows;
  int ticket;          // which of the plan's
  bool plan_is_old;    // the plan was complete before the preceding kernel began
  FewPairs few_pairs;  // what the plan is made from, complete as well; or none
};

inline constexpr int kNoMoreJobs = -1;  // as a job's live

template <int kSubtiles_, int kMaxWidth_, int kWarpgroups_, int kStages_>
struct GroupedGemmTile {
  static constexpr int kSubtiles = kSubtiles_;  // token sub-tiles that share a decoded record
  static constexpr int kMaxWidth = kMaxWidth_;  // tokens of a sub-tile, at most
  static constexpr int kWarpgroups = kWarpgroups_;
  static constexpr int kStages = kStages_;
  static constexpr int kTokens = kSubtiles * kMaxWidth;
  static constexpr int kThreads = 128 * kWarpgroups + 128;
  static_assert(kTokens >= kMinTileTokens, "the plan has room for that many tiles only");
  static_assert(kWarpgroups <= 3, "a storing warp each, beside the producer's");

  // Shared memory.
  static constexpr int kTokenBytes = kTokens * 128;
  static constexpr int kWeightBytes = kWarpgroups * kRecordBytes;
  static constexpr int kStagingBytes = kTokens * kStagingRow;
  static constexpr int kScaleBytes = kTokens * 4;
  static constexpr int kWeightsAt = kStages * kTokenBytes;
  static constexpr int kStagingAt = kWeightsAt + kStages * kWeightBytes;
  static constexpr int kScalesAt = kStagingAt + kWarpgroups * kStagingBytes;
  static constexpr int kTableAt = kScalesAt + kWarpgroups * 2 * kScaleBytes;
  // Items between what the producer loads and what the slowest warpgroup finishes: one per stage,
  // the one being finished and the one being announced.
  static constexpr int kItems = kStages + 2;
  static constexpr int kItemsAt = kTableAt + Mxfp4::kTableBytes;
  static constexpr int kJobsAt = kItemsAt + kItems * static_cast<int>(sizeof(WorkItem));
  static constexpr int kBarriersAt = kJobsAt + kWarpgroups * static_cast<int>(sizeof(StoreJob));
  static constexpr int kSharedBytes = kBarriersAt + 16 * (kStages + kWarpgroups);
  static_assert(kItemsAt % 16 == 0, "items are aligned");
  static_assert(kSharedBytes <= 227 * 1024, "a block has 227 KiB of shared memory");

  // Sub-tiles are compiled for multiples of 8 tokens; two of them have enough to do from 32 on.
  static constexpr int kMinWidth = kSubtiles > 1 ? 32 : 8;
  // Calls f with such a width as a constant.
  template <int kWidth = kMinWidth, typename F>
  static __device__ __forceinline__ void WithWidth(int width, F&& f) {
    if (width == kWidth) {
      f(std::integral_constant<int, kWidth>{});
    } else if constexpr (kWidth < kMaxWidth) {
      WithWidth<kWidth + 8>(width, f);
    }
  }
};

inline constexpr int kNoMoreItems = -1;  // as an item's width

__device__ __forceinline__ void Announce(volatile WorkItem& to, const WorkItem& item) {
  to.expert = item.expert;
  to.first_slab = item.first_slab;
  to.slabs = item.slabs;
  to.first_row = item.first_row;
  to.live = item.live;
  to.width = item.width;
}

inline constexpr int kRunSteps = 8;  // K128 of a run of items, about

// The producer warp: one lane per copy of a stage. Before the preceding kernel has written the
// tokens, the weights of the first stages can be on their way.
template <typename Tile>
__device__ __forceinline__ void LoadItems(const GroupedGemmParams& p, uint32_t shared,
                                          volatile WorkItem* items) {
  constexpr int kWarpgroups = Tile::kWarpgroups, kStages = Tile::kStages;
  const uint32_t full = shared + Tile::kBarriersAt, empty = full + 8 * kStages;
  const int lane = threadIdx.x % 32;
  const bool is_few = p.few_pairs.num_pairs > 0, is_early = p.plan_is_old || is_few;
  const int k_blocks = p.weights.k_blocks;
  // A ticket is for a run of items, of several where they are short, and asked for a run ahead: the
  // answer takes as long as several K128.
  const int run = max(kRunSteps / k_blocks, 1), first_item = blockIdx.x * run;
  if (!is_early) ptx::WaitForPrecedingKernels();
  const PlanOfFew few(p.few_pairs);
  const int num_tiles = is_few ? few.num_tiles : p.plan.head->num_tiles;
  const RowTiles rows(p.weights.row_blocks, kWarpgroups, num_tiles, gridDim.x);
  const int num_items = num_tiles * rows.count;
  PlannedTile planned{};
  if (first_item < num_items) {
    const int tile = first_item / rows.count;
    planned = is_few ? few.Tile(tile) : p.plan.tiles[tile];
  }
  __syncthreads();  // the barriers are there

  const bool is_tokens = lane == kWarpgroups;
  const uint32_t to = shared + (is_tokens ? 0 : Tile::kWeightsAt + lane * kRecordBytes);
  const uint32_t stage_bytes = is_tokens ? Tile::kTokenBytes : Tile::kWeightBytes;
  const uint64_t policy = is_tokens ? ptx::kEvictNormal : ptx::kEvictFirst;
  const int64_t k_step = is_tokens ? p.image_rows * 128 : kRecordBytes;
  // Tokens are copied after the early weights; those of few pairs are there soon.
  int early = is_early ? min(k_blocks, is_few ? 3 : kStages) : 0;
  int stage = 0, slot = 0, ticket = 0;
  uint32_t parity = 1;
  for (int i = first_item; i < num_items;) {
    const WorkItem item = ItemAt<Tile>(planned, rows, i);
    const bool copies = is_tokens || lane < item.slabs;
    const uint8_t* from = is_tokens ? p.image + item.first_row * 128
                                    : p.weights.Slab(item.expert, item.first_slab + lane);
    const uint32_t tile_bytes = item.live * 128;
    const uint32_t bytes = is_tokens ? tile_bytes : kRecordBytes;
    auto expect = [&](int k) {
      if (lane == 0) {
        if (k == 0) Announce(items[slot], item);
        ptx::BarrierArriveExpect(full + 8 * stage, tile_bytes + item.slabs * kRecordBytes);
      }
      __syncwarp();
    };
    auto copy = [&] {
      ptx::BulkCopy(to + stage * stage_bytes, from, bytes, full + 8 * stage, policy);
      from += k_step;
    };
    auto advance = [&] {
      if (++stage == kStages) {
        stage = 0;
        parity ^= 1;
      }
    };
    if (early > 0) {
      for (stage = 0; stage < early; ++stage) {
        expect(stage);
        if (copies && !is_tokens) copy();
      }
      ptx::WaitForPrecedingKernels();
      for (stage = 0; stage < early; ++stage) {
        if (is_tokens) copy();
      }
      --stage;
      advance();
    }
    // Not before the wait: dependents take for granted what the preceding kernels wrote.
    ptx::LaunchDependents();
    if (i % run == 0 && lane == 0) ticket = atomicAdd(p.plan.head->tickets + p.ticket, 1);
    int next = i + 1;
    auto take_next = [&] {
      if (next % run == 0) next = (gridDim.x + __shfl_sync(~0u, ticket, 0)) * run;
      if (next < num_items) planned = p.plan.tiles[next / rows.count];
    };
    if (run > 1) take_next();
    for (int k = early; k < k_blocks; ++k) {
      ptx::BarrierWait(empty + 8 * stage, parity);
      expect(k);
      if (copies) copy();
      advance();
    }
    early = 0;
    slot = slot + 1 == Tile::kItems ? 0 : slot + 1;
    if (run == 1) take_next();
    i = next;
  }
  ptx::WaitForPrecedingKernels();  // also where there was no item
  ptx::LaunchDependents();
  ptx::BarrierWait(empty + 8 * stage, parity);
  if (lane == 0) {
    Announce(items[slot], {0, 0, 0, 0, 0, kNoMoreItems});
    ptx::BarrierArrive(full + 8 * stage);
  }
}

// A warp that stores what its warpgroup stages.
template <typename Epilogue>
__device__ __forceinline__ void StoreItems(const Epilogue& epilogue, volatile const StoreJob& job,
                                           uint32_t staging, uint32_t staged, uint32_t drained) {
  for (uint32_t parity = 0;; parity ^= 1) {
    ptx::BarrierWait(staged, parity);
    const int live = job.live;
    if (live == kNoMoreJobs) return;
    epilogue.Store(job.first_row, job.slab, live, staging);
    ptx::BarrierArrive(drained);
  }
}

template <typename Tile, typename Epilogue>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    GroupedGemm(const __grid_constant__ GroupedGemmParams p,
                const __grid_constant__ Epilogue epilogue) {
  constexpr int kWarpgroups = Tile::kWarpgroups, kStages = Tile::kStages;
  constexpr bool kStaged = Epilogue::kStaged;
  extern __shared__ __align__(1024) uint8_t shared[];
  const uint32_t tokens = ptx::SharedAddress(shared), weights = tokens + Tile::kWeightsAt;
  const uint32_t full = tokens + Tile::kBarriersAt, empty = full + 8 * kStages;
  // The producer announces an item with its first stage.
  volatile WorkItem* items = reinterpret_cast<WorkItem*>(shared + Tile::kItemsAt);
  volatile StoreJob* jobs = reinterpret_cast<StoreJob*>(shared + Tile::kJobsAt);
  auto staged_barrier = [&](int w) { return empty + 8 * (kStages + 2 * w); };
  auto drained_barrier = [&](int w) { return empty + 8 * (kStages + 2 * w + 1); };
  auto staging_of = [&](int w) { return tokens + Tile::kStagingAt + w * Tile::kStagingBytes; };

  if (threadIdx.x < Mxfp4::kTableBytes) {
    shared[Tile::kTableAt + threadIdx.x] = Mxfp4::TableByte(threadIdx.x);
  }
  if (const int s = threadIdx.x; s < kStages) {
    ptx::BarrierInit(full + 8 * s, 1);
    ptx::BarrierInit(empty + 8 * s, 4 * kWarpgroups);  // one arrival per warp
    if (s < kWarpgroups) {
      ptx::BarrierInit(staged_barrier(s), 128);
      ptx::BarrierInit(drained_barrier(s), 32);
    }
    ptx::BarrierInitFence();
  }
  const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0), thread = threadIdx.x % 128;

  if (warpgroup == kWarpgroups) {
    cutlass::arch::warpgroup_reg_dealloc<kWarpgroups == 2 ? 40 : 56>();
    const int warp = __shfl_sync(~0u, thread / 32, 0);
    if (warp == 0) {
      LoadItems<Tile>(p, tokens, items);
      return;
    }
    __syncthreads();
    if constexpr (kStaged) {
      const int w = warp - 1;
      if (w < kWarpgroups) {
        StoreItems(epilogue, jobs[w], staging_of(w), staged_barrier(w), drained_barrier(w));
      }
    }
    return;
  }

  cutlass::arch::warpgroup_reg_alloc<kWarpgroups == 2 ? 232 : 152>();
  __syncthreads();
  ptx::WaitForPrecedingKernels();
  const uint32_t table = tokens + Tile::kTableAt;
  const uint64_t first_tile = TokenDescriptor(tokens);
  int stage = 0;
  uint32_t parity = 0;
  auto advance = [&] {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  };
  auto release = [&](int used) {
    __syncwarp();  // all lanes have read
    if (thread % 32 == 0) ptx::BarrierArrive(empty + 8 * used);
  };
  auto hand_over = [&] { ptx::BarrierArrive(staged_barrier(warpgroup)); };
  // Of the tiles that this warpgroup has finished, whether they are odd: scales have two places,
  // since a thread may begin the next tile while another still reads this one's.
  uint32_t odd = 0;
  for (int slot = 0;; slot = slot + 1 == Tile::kItems ? 0 : slot + 1) {
    ptx::BarrierWait(full + 8 * stage, parity);
    volatile WorkItem& item = items[slot];  // registers are scarce
    const uint32_t scales = tokens + Tile::kScalesAt + (2 * warpgroup + odd) * Tile::kScaleBytes;
    const float* row_scale = p.row_scale + item.first_row;
    for (int t = thread, live = item.live; t < live; t += 128) {
      ptx::CopyAsync4(scales + t * 4, row_scale + t);
    }
    // One value for all decisions, known to be uniform from after the last divergent branch on:
    // else the ring's stage is not, and every descriptor of WGMMA goes through vector registers.
    const bool idle = warpgroup >= item.slabs;
    const int width = ptx::Uniform(idle ? min(item.width, 0) : item.width);
    if (width == kNoMoreItems) break;
    if (width == 0) {  // fewer slabs than warpgroups
      for (int k = 0; k < p.weights.k_blocks; ++k) {
        ptx::BarrierWait(full + 8 * stage, parity);
        release(stage);
        advance();
      }
      ptx::CopyAsyncWait();  // before the next item's scales go to the same place
      continue;
    }
    Tile::WithWidth(width, [&](auto width) {
      constexpr int kWidth = decltype(width)::value, kSubtiles = Tile::kSubtiles;
      float acc[kSubtiles][kWidth / 2], partial[kWidth / 2];
      uint32_t a[2][4][4];
      Mxfp4::Tables tables;
#pragma unroll
      for (int n = 0; n < kSubtiles; ++n) {
#pragma unroll
        for (int j = 0; j < kWidth / 2; ++j) acc[n][j] = 0.0f;
      }
      auto record_at = [&](int at) {
        return weights + at * Tile::kWeightBytes + warpgroup * kRecordBytes;
      };
      auto load_first = [&](uint32_t (&fragments)[4][4]) {
        ptx::BarrierWait(full + 8 * stage, parity);
        tables = Mxfp4::LoadTables(record_at(stage), thread, table);
        Mxfp4::LoadPlane<0>(record_at(stage), thread, tables, fragments);
      };
      auto load_second = [&](uint32_t (&fragments)[4][4]) {
        Mxfp4::LoadPlane<1>(record_at(stage), thread, tables, fragments);
      };
      auto multiply = [&](int at, int n, float (&products)[kWidth / 2],
                          const uint32_t (&fragments)[4][4]) {
        MultiplyK128<kWidth>(products, fragments,
                             first_tile + (at * Tile::kTokens + n * kWidth) * kDescriptorToken);
      };
      // Nothing is read from shared memory between a product's end and the next one's issue: beside
      // WGMMA's own reads that takes long.
      auto add = [&](float (&sum)[kWidth / 2], const float (&products)[kWidth / 2],
                     const float (&scale)[2]) {
#pragma unroll
        for (int j = 0; j < kWidth / 2; ++j) {
          sum[j] = fmaf(products[j], scale[j / 2 % 2], sum[j]);
        }
      };
      // One K128, decoded into `now`; the next is decoded into `next` while the products run.
      auto step = [&](const uint32_t (&now)[4][4], uint32_t (&next)[4][4], bool more) {
        const int used = stage;
        float scale[2];
        advance();
#pragma unroll
        for (int n = 0; n < kSubtiles; ++n) {
          multiply(used, n, partial, now);
          if (n == 0) Mxfp4::LoadScale(record_at(used), thread, scale);
          if (n == 0 && more) load_first(next);
          if (n + 1 == kSubtiles && more) load_second(next);
          WaitForProducts<0>(partial);
          if (n + 1 == kSubtiles) release(used);
          add(acc[n], partial, scale);
        }
      };
      load_first(a[0]);
      load_second(a[0]);
      for (int k = p.weights.k_blocks;; k -= 2) {
        step(a[0], a[1], k > 1);
        if (k == 1) break;
        step(a[1], a[0], k > 2);
        if (k == 2) break;
      }
      EpilogueTile tile{ptx::FreshThreadIndex() % 128,
                        item.expert,
                        item.first_slab + warpgroup,
                        item.live,
                        item.first_row,
                        scales,
                        staging_of(warpgroup),
                        0};
      ptx::CopyAsyncWait();
      ptx::NamedBarrier(1 + warpgroup, 128);  // the scales are there
      if constexpr (kStaged) {
        ptx::BarrierWait(drained_barrier(warpgroup), odd ^ 1);
        if (tile.thread == 0) {
          volatile StoreJob& job = jobs[warpgroup];
          job.first_row = tile.first_row;
          job.slab = tile.slab;
          job.live = tile.live;
        }
      }
#pragma unroll
      for (int n = 0; n < kSubtiles; ++n) {
        if constexpr (kStaged) {
          epilogue.template Stage<kWidth>(acc[n], tile);
        } else {
          epilogue.template Store<kWidth>(acc[n], tile);
        }
        tile.live -= kWidth;
        tile.first_row += kWidth;
        tile.scales += kWidth * 4;
        tile.staged += kWidth;
      }
      if constexpr (kStaged) hand_over();
    });
    odd ^= 1;
  }
  if constexpr (kStaged) {
    ptx::BarrierWait(drained_barrier(warpgroup), odd ^ 1);
    if (thread == 0) jobs[warpgroup].live = kNoMoreJobs;
    hand_over();
  }
}

}  // namespace jax_w4moe
