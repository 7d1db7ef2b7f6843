// Grouped GEMM on packed 4-bit records: for the rows of every expert, weights times tokens, handed
// to an epilogue in tiles of 64 rows of weights by up to 64 tokens.
//
// One persistent CTA per SM: a producer warp streams records and token tiles through a ring of
// shared-memory stages by bulk copies; kWarpgroups math warpgroups own 64 rows of weights each,
// decode them in registers, multiply (weights are A, tokens are N) and add every K128 product in
// f32. The next record is decoded while this one multiplies, and serves kSubtiles token tiles.
// docs/numerics.md: R2, R5.
#pragma once

#include <cutlass/arch/reg_reconfig.h>

#include <type_traits>

#include "epilogue/tile.cuh"
#include "formats/mxfp4.cuh"
#include "mainloop/wgmma.cuh"
#include "schedule/grouped.cuh"

namespace jax_w4moe {

struct GroupedGemmParams {
  const uint8_t* records;  // [E, row_blocks, k_blocks, kRecordBytes]
  const uint8_t* image;    // token image, [k_blocks][image_rows][128]
  const float* row_scale;  // [image_rows]
  Plan plan;
  int num_experts;
  int row_blocks;
  int k_blocks;
  int64_t image_rows;
  int ticket;        // which of the plan's
  bool plan_is_old;  // the plan was complete before the preceding kernel began
};

template <int kSubtiles_, int kMaxWidth_, int kWarpgroups_, int kStages_>
struct GroupedGemmTile {
  static constexpr int kSubtiles = kSubtiles_;  // token sub-tiles that share a decoded record
  static constexpr int kMaxWidth = kMaxWidth_;  // tokens of a sub-tile, at most
  static constexpr int kWarpgroups = kWarpgroups_;
  static constexpr int kStages = kStages_;
  static constexpr int kTokens = kSubtiles * kMaxWidth;
  static constexpr int kThreads = 128 * kWarpgroups + 128;

  // Shared memory.
  static constexpr int kTokenBytes = kTokens * 128;
  static constexpr int kWeightBytes = kWarpgroups * kRecordBytes;
  static constexpr int kWeightsAt = kStages * kTokenBytes;
  static constexpr int kStagingAt = kWeightsAt + kStages * kWeightBytes;
  static constexpr int kStagingBytes = kMaxWidth * kStagingRow;
  static constexpr int kScalesAt = kStagingAt + kWarpgroups * kStagingBytes;
  static constexpr int kTableAt = kScalesAt + kWarpgroups * kTokens * 4;
  static constexpr int kBarriersAt = kTableAt + Mxfp4::kTableBytes;
  // Items between what the producer loads and what the slowest warpgroup stores: one per stage, the
  // one being stored and the one being announced.
  static constexpr int kItems = kStages + 2;
  static constexpr int kItemsAt = kBarriersAt + 16 * kStages;
  static constexpr int kPlanAt = kItemsAt + kItems * static_cast<int>(sizeof(WorkItem));
  static constexpr int kSharedBytes = kPlanAt + static_cast<int>(sizeof(SharedPlan));
  static_assert(kItemsAt % 16 == 0, "items are aligned");
  static_assert(kSharedBytes <= 227 * 1024, "a block has 227 KiB of shared memory");

  // Sub-tiles are compiled for multiples of 8 tokens. RoundWidth gives the smallest that holds so
  // many; WithWidth calls f with it as a constant.
  static __device__ __forceinline__ int RoundWidth(int tokens) {
    return max((tokens + 7) / 8, 1) * 8;
  }
  template <int kWidth = 8, typename F>
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
  to.first_row = item.first_row;
  to.live = item.live;
  to.width = item.width;
}

template <typename Tile, typename Epilogue>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    GroupedGemm(const __grid_constant__ GroupedGemmParams p,
                const __grid_constant__ Epilogue epilogue) {
  constexpr int kWarpgroups = Tile::kWarpgroups, kStages = Tile::kStages;
  extern __shared__ __align__(1024) uint8_t shared[];
  const uint32_t tokens = ptx::SharedAddress(shared), weights = tokens + Tile::kWeightsAt;
  const uint32_t full = tokens + Tile::kBarriersAt, empty = full + 8 * kStages;
  // The producer announces an item with its first stage.
  volatile WorkItem* items = reinterpret_cast<WorkItem*>(shared + Tile::kItemsAt);
  SharedPlan& plan = *reinterpret_cast<SharedPlan*>(shared + Tile::kPlanAt);
  const int row_tiles = (p.row_blocks + kWarpgroups - 1) / kWarpgroups;
  const int64_t slab_bytes = int64_t{p.k_blocks} * kRecordBytes;

  if (threadIdx.x < Mxfp4::kTableBytes) {
    shared[Tile::kTableAt + threadIdx.x] = Mxfp4::TableByte(threadIdx.x);
  }
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) {
      ptx::BarrierInit(full + 8 * s, 1);
      ptx::BarrierInit(empty + 8 * s, 4 * kWarpgroups);  // one arrival per warp
    }
    ptx::BarrierInitFence();
  }
  if (!p.plan_is_old) ptx::WaitForPrecedingKernels();
  plan.Load(p.plan, p.num_experts, threadIdx.x, Tile::kThreads);
  __syncthreads();
  const int num_items = ptx::Uniform(plan.tile_start[p.num_experts]) * row_tiles;
  const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0), thread = threadIdx.x % 128;
  auto item_at = [&](int item) { return ItemAt<Tile>(plan, p.num_experts, row_tiles, item); };
  auto first_record = [&](const WorkItem& item) {
    return p.records + (int64_t{item.expert} * p.row_blocks + item.first_slab) * slab_bytes;
  };

  if (warpgroup == kWarpgroups) {  // producer: one warp, one lane per copy of a stage
    cutlass::arch::warpgroup_reg_dealloc<40>();
    if (thread >= 32) return;
    const bool is_tokens = thread == kWarpgroups;
    const uint32_t offset = is_tokens ? 0 : Tile::kWeightsAt + thread * kRecordBytes;
    const uint32_t stage_bytes = is_tokens ? Tile::kTokenBytes : Tile::kWeightBytes;
    const uint64_t policy = is_tokens ? ptx::kEvictNormal : ptx::kEvictFirst;
    const int64_t k_step = is_tokens ? p.image_rows * 128 : kRecordBytes;
    auto slabs_of = [&](const WorkItem& item) {
      return min(kWarpgroups, p.row_blocks - item.first_slab);
    };
    if (p.plan_is_old) {
      // While the preceding kernel still writes the tokens, the weights can come to L2.
      if (blockIdx.x < num_items) {
        const WorkItem item = item_at(blockIdx.x);
        if (thread < slabs_of(item)) {
          ptx::PrefetchToL2(first_record(item) + thread * slab_bytes,
                            static_cast<uint32_t>(slab_bytes));
        }
      }
      ptx::WaitForPrecedingKernels();
    }
    ptx::LaunchDependents();
    int stage = 0;
    uint32_t parity = 1;
    int* taken = p.plan.tickets + p.ticket;
    int slot = 0;
    for (int i = blockIdx.x; i < num_items;) {
      // The next item's number is asked for early: the answer takes as long as a K128 or two.
      int following = 0;
      if (thread == 0) following = gridDim.x + atomicAdd(taken, 1);
      const WorkItem item = item_at(i);
      const int slabs = slabs_of(item);
      const bool copies = is_tokens || thread < slabs;
      const uint8_t* source =
          is_tokens ? p.image + item.first_row * 128 : first_record(item) + thread * slab_bytes;
      const uint32_t tile_bytes = item.live * 128;
      const uint32_t bytes = is_tokens ? tile_bytes : kRecordBytes;
      for (int k = p.k_blocks; k > 0; --k) {
        ptx::BarrierWait(empty + 8 * stage, parity);
        if (thread == 0) {
          if (k == p.k_blocks) Announce(items[slot], item);
          ptx::BarrierArriveExpect(full + 8 * stage, tile_bytes + slabs * kRecordBytes);
        }
        __syncwarp();
        if (copies) {
          ptx::BulkCopy(tokens + offset + stage * stage_bytes, source, bytes, full + 8 * stage,
                        policy);
        }
        source += k_step;
        if (++stage == kStages) {
          stage = 0;
          parity ^= 1;
        }
      }
      slot = slot + 1 == Tile::kItems ? 0 : slot + 1;
      i = __shfl_sync(~0u, following, 0);
    }
    ptx::BarrierWait(empty + 8 * stage, parity);
    if (thread == 0) {
      Announce(items[slot], {0, 0, 0, 0, kNoMoreItems});
      ptx::BarrierArrive(full + 8 * stage);
    }
    return;
  }

  cutlass::arch::warpgroup_reg_alloc<kWarpgroups == 2 ? 232 : 152>();
  if (p.plan_is_old) ptx::WaitForPrecedingKernels();
  const uint32_t table = tokens + Tile::kTableAt;
  const uint64_t first_tile = TokenDescriptor(tokens);
  const uint32_t scales = tokens + Tile::kScalesAt + warpgroup * Tile::kTokens * 4;
  int stage = 0;
  uint32_t parity = 0;
  auto advance = [&] {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  };
  auto release = [&](int used) {
    if (thread % 32 == 0) ptx::BarrierArrive(empty + 8 * used);
  };
  for (int slot = 0;; slot = slot + 1 == Tile::kItems ? 0 : slot + 1) {
    ptx::BarrierWait(full + 8 * stage, parity);
    volatile WorkItem& item = items[slot];  // registers are scarce
    const float* row_scale = p.row_scale + item.first_row;
    for (int t = thread, live = item.live; t < live; t += 128) {
      ptx::CopyAsync4(scales + t * 4, row_scale + t);
    }
    // One value for all decisions, known to be uniform from after the last divergent branch on:
    // else the ring's stage is not, and every descriptor of WGMMA goes through vector registers.
    const bool idle = item.first_slab + warpgroup >= p.row_blocks;
    const int width = ptx::Uniform(idle ? min(item.width, 0) : item.width);
    if (width == kNoMoreItems) break;
    if (width == 0) {  // the last slabs do not fill all warpgroups
      for (int k = 0; k < p.k_blocks; ++k) {
        ptx::BarrierWait(full + 8 * stage, parity);
        release(stage);
        advance();
      }
      ptx::CopyAsyncWait();  // before the next item's scales go to the same place
      continue;
    }
    Tile::WithWidth(width, [&](auto width) {
      constexpr int kWidth = decltype(width)::value, kSubtiles = Tile::kSubtiles;
      float acc[kSubtiles][kWidth / 2], partial[2][kWidth / 2];
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
      // kSteps K128, the first of them decoded into a[0]. While one product is added, the next is
      // in flight and the next record is decoded. ptxas serialises what stays in flight from one
      // turn of a loop to the next, so all is added at the end.
      auto steps = [&](auto num_steps, bool more) {
        constexpr int kSteps = decltype(num_steps)::value, kProducts = kSteps * kSubtiles;
        int used = stage;
        multiply(used, 0, partial[0], a[0]);
#pragma unroll
        for (int i = 0; i < kProducts; ++i) {
          const int now = i / kSubtiles, n = i % kSubtiles, next = (i + 1) / kSubtiles;
          if (n == 0) {
            used = stage;
            advance();
          }
          if (next == now) multiply(used, n + 1, partial[(i + 1) % 2], a[now % 2]);
          if (now + 1 < kSteps || more) {  // in two parts, while the first two products run
            if (n == 0) load_first(a[(now + 1) % 2]);
            if (n == (kSubtiles > 1 ? 1 : 0)) load_second(a[(now + 1) % 2]);
          }
          if (next != now && i + 1 < kProducts) {
            multiply(stage, 0, partial[(i + 1) % 2], a[next % 2]);
          }
          float scale[2];  // read for every product: registers are scarce
          Mxfp4::LoadScale(record_at(used), thread, scale);
          if (i + 1 < kProducts) {
            WaitForProducts<1>(partial[i % 2]);
          } else {
            WaitForProducts<0>(partial[i % 2]);
          }
          if (n + 1 == kSubtiles) release(used);
#pragma unroll
          for (int j = 0; j < kWidth / 2; ++j) {
            acc[n][j] = fmaf(partial[i % 2][j], scale[j / 2 % 2], acc[n][j]);
          }
        }
      };
      load_first(a[0]);
      load_second(a[0]);
      int k = p.k_blocks;
      for (; k >= 2; k -= 2) steps(std::integral_constant<int, 2>{}, k > 2);
      if (k == 1) steps(std::integral_constant<int, 1>{}, false);
      EpilogueTile tile{warpgroup,   ptx::FreshThreadIndex() % 128,
                        item.expert, item.first_slab + warpgroup,
                        item.live,   item.first_row,
                        scales,      tokens + Tile::kStagingAt + warpgroup * Tile::kStagingBytes};
      ptx::CopyAsyncWait();
#pragma unroll
      for (int n = 0; n < kSubtiles; ++n) {
        tile.Sync();  // the scales are there, the staging is free
        if (tile.live > 0) epilogue.template Store<kWidth>(acc[n], tile);
        tile.live -= kWidth;
        tile.first_row += kWidth;
        tile.scales += kWidth * 4;
      }
      tile.Sync();  // scales and staging are free again
    });
  }
}

}  // namespace jax_w4moe
