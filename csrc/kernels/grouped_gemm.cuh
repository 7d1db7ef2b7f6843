// Grouped GEMM on packed 4-bit records: for the rows of every expert, weights times tokens, handed
// to an epilogue in tiles of 64 rows of weights.
//
// One persistent CTA per SM. A producer warp streams records and token tiles through a ring of
// shared-memory stages by bulk copies; kWarpgroups math warpgroups own 64 rows of weights each,
// decode them in registers, multiply (weights are A, tokens are N) and add the product of every
// group that has a scale, 128 of K at most, in f32; a warp for each of them stores what it has
// staged. The next record is decoded while this one multiplies, and serves kSubtiles token tiles.
// docs/numerics.md: R2, R5.
#pragma once

#include <cutlass/arch/reg_reconfig.h>

#include "epilogue/epilogue.cuh"
#include "kernels/gemm_tile.cuh"
#include "kernels/load_items.cuh"
#include "kernels/ring.cuh"
#include "kernels/store_items.cuh"
#include "mainloop/wgmma.cuh"

namespace jax_w4moe {

template <typename Tile>
__global__ void __maxnreg__(Tile::kRegisters.start)
    GroupedGemm(const __grid_constant__ GroupedGemmParams p,
                const __grid_constant__ Epilogue epilogue) {
  using Decoder = typename Tile::Decoder;
  using Activations = typename Tile::Activations;
  constexpr int kWarpgroups = Tile::kWarpgroups, kStages = Tile::kStages;
  extern __shared__ __align__(1024) uint8_t shared[];
  const uint32_t tokens = ptx::SharedAddress(shared), weights = tokens + Tile::kWeightsAt;
  const uint32_t full = tokens + Tile::kBarriersAt, empty = full + 8 * kStages;
  // The producer announces an item with its first stage.
  volatile WorkItem* items = reinterpret_cast<WorkItem*>(shared + Tile::kItemsAt);

  WriteTable<Decoder>(shared + Tile::kTableAt);
  if (const int s = threadIdx.x; s < kStages) {
    ptx::BarrierInit(full + 8 * s, 1);
    ptx::BarrierInit(empty + 8 * s, 4 * kArrivingLanes * kWarpgroups);
    ptx::BarrierInitFence();
  }
  if (const int s = threadIdx.x; s < kWarpgroups * Tile::kBuffers) {
    const Staging<Tile> first{tokens, 0};
    ptx::BarrierInit(first.Staged(0) + 16 * s, 128);
    ptx::BarrierInit(first.Drained(0) + 16 * s, 32);
    ptx::BarrierInitFence();
  }
  const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0), thread = threadIdx.x % 128;

  if (warpgroup == kWarpgroups) {
    cutlass::arch::warpgroup_reg_dealloc<Tile::kRegisters.producer>();
    const int warp = __shfl_sync(~0u, thread / 32, 0);
    if (warp == 0) {
      LoadItems<Tile>(p, tokens, items);
      return;
    }
    __syncthreads();
    if (const int w = warp - 1; w < kWarpgroups) {
      StoreItems(epilogue, p.counts_slabs ? p.plan.slabs_done : nullptr, shared,
                 Staging<Tile>{tokens, w});
    }
    return;
  }

  cutlass::arch::warpgroup_reg_alloc<Tile::kRegisters.math>();
  __syncthreads();
  // Else the first stage is full when its rows are there.
  if (!p.waits_for_rows) ptx::WaitForPrecedingKernels();
  const uint32_t table = tokens + Tile::kTableAt;
  const RecordThread reader(thread, !Tile::kIsTight);
  const uint32_t first_tile = TokenDescriptor(tokens);
  RingPlace<kStages> ring;
  auto release = [&](int used) { WarpArrive(empty + 8 * used); };
  const Staging<Tile> staging{tokens, warpgroup};
  int job = 0;  // how many sub-tiles this warpgroup has handed over
  // Of the items that this warpgroup has finished, whether they are odd: scales have two places,
  // since a thread may begin the next item while another still reads this one's.
  uint32_t odd = 0;
  for (int slot = 0;; slot = slot + 1 == Tile::kItems ? 0 : slot + 1) {
    ptx::BarrierWait(full + 8 * ring.stage, ring.parity);
    volatile WorkItem& item = items[slot];  // registers are scarce
    const uint32_t scales = tokens + Tile::kScalesAt + (2 * warpgroup + odd) * Tile::kScaleBytes;
    const float* row_scale = p.row_scale + item.first_row;
    for (int t = ptx::FreshThreadIndex() % 128, live = item.live; t < live; t += 128) {
      ptx::CopyAsync4(scales + t * 4, row_scale + t);
    }
    // One value for all decisions, known to be uniform from after the last divergent branch on:
    // else the ring's stage is not, and every descriptor of WGMMA goes through vector registers.
    const bool idle = warpgroup >= item.slabs;
    const int width = ptx::Uniform(idle ? min(item.width, 0) : item.width);
    if (width == kNoMoreItems) break;
    if (width == 0) {  // fewer slabs than warpgroups
      for (int k = 0; k < p.weights.k_blocks; ++k) {
        ptx::BarrierWait(full + 8 * ring.stage, ring.parity);
        release(ring.stage);
        ring.Advance();
      }
      ptx::CopyAsyncWait();  // before the next item's scales go to the same place
      continue;
    }
    Tile::WithWidth(width, [&](auto width) {
      constexpr int kWidth = decltype(width)::value, kSubtiles = Tile::kSubtiles;
      float acc[kSubtiles][kWidth / 2];
#pragma unroll
      for (int n = 0; n < kSubtiles; ++n) {
#pragma unroll
        for (int j = 0; j < kWidth / 2; ++j) acc[n][j] = 0.0f;
      }
      auto record_at = [&](int at) {
        return weights + at * Tile::kWeightBytes + warpgroup * Tile::kRecordBytes;
      };
      float partial[kWidth / 2];
      // Of the record that is multiplied and of the next one, in turn.
      Plane first[2], second[Tile::kSecondPlanes];
      typename Decoder::Scales group_scales;
      uint32_t record;  // the last that was loaded
      typename Decoder::Tables tables;
      auto load_first = [&](int to) {
        ptx::BarrierWait(full + 8 * ring.stage, ring.parity);
        record = record_at(ring.stage);
        tables = Decoder::LoadTables(record, reader, table);
        Decoder::DecodePlane(Codes<0>(record, reader), tables, first[to]);
      };
      auto load_second = [&](int to) {
        Decoder::DecodePlane(Codes<1>(record, reader), tables, second[to % Tile::kSecondPlanes]);
      };
      auto token_tile = [&](int at, int first) {
        return first_tile + (at * Tile::kPanels * Tile::kTokens + first) * kDescriptorToken;
      };
      // One K128; the next is decoded while the products run, but for its second plane where that
      // has one place. Nothing else is read from shared memory between a product's end and the
      // next one's issue: beside WGMMA's own reads that takes long.
      auto step = [&](auto which, bool more) {
        constexpr int kNow = decltype(which)::value, kNext = 1 - kNow;
        const int used = ring.stage;
        ring.Advance();
#pragma unroll
        for (int n = 0; n < kSubtiles; ++n) {
          ForEachGroup<Tile::kGroups>([&](auto group) {
            constexpr int kGroup = decltype(group)::value;
            const bool is_first = n == 0 && kGroup == 0;
            const bool is_last = n + 1 == kSubtiles && kGroup + 1 == Tile::kGroups;
            Multiply<Activations, kWidth, Tile::kGroups, kGroup>(
                partial, first[kNow], second[kNow % Tile::kSecondPlanes],
                token_tile(used, n * kWidth), Tile::kTokens * kDescriptorToken);
            if (is_first) group_scales = Decoder::LoadScales(record, reader);
            if (Tile::kSecondPlanes == 2 && is_first && is_last) {
              // One branch, in which all loads are on their way at once.
              if (more) {
                load_first(kNext);
                load_second(kNext);
              }
            } else {
              if (is_first && more) load_first(kNext);
              if (Tile::kSecondPlanes == 2 && is_last && more) load_second(kNext);
            }
            WaitForProducts(partial);
            if (is_last) release(used);
            if (Tile::kSecondPlanes == 1 && is_last && more) load_second(kNext);
#pragma unroll
            for (int j = 0; j < kWidth / 2; ++j) {
              acc[n][j] =
                  fmaf(partial[j], Decoder::Scale(group_scales, kGroup, j / 2 % 2), acc[n][j]);
            }
          });
        }
      };
      constexpr std::integral_constant<int, 0> zero;
      constexpr std::integral_constant<int, 1> one;
      load_first(0);
      load_second(0);
      for (int k = p.weights.k_blocks;; k -= 2) {
        step(zero, k > 1);
        if (k == 1) break;
        step(one, k > 2);
        if (k == 2) break;
      }
      EpilogueTile tile{ptx::FreshThreadIndex() % 128,
                        item.expert,
                        item.first_slab + warpgroup,
                        item.live,
                        item.first_row,
                        scales,
                        0};
      ptx::CopyAsyncWait();
      ptx::NamedBarrier(1 + warpgroup, 128);  // the scales are there
      epilogue.WithKind([&](const auto& finish) {
#pragma unroll
        for (int n = 0; n < kSubtiles; ++n) {
          if (epilogue.IsStaged()) {
            staging.WaitDrained(job);
            tile.staging = staging.At(job);
            if (tile.thread == 0) {
              volatile StoreJob& to = staging.Job(shared, job);
              to.first_row = tile.first_row;
              to.slab = tile.slab;
              to.live = min(max(tile.live, 0), kWidth);
              to.finishes = n + 1 == kSubtiles ? tile.expert : kNoExpert;
            }
          }
          finish(width, acc[n], tile);
          if (epilogue.IsStaged()) ptx::BarrierArrive(staging.Staged(job++));
          tile.live -= kWidth;
          tile.first_row += kWidth;
          tile.scales += kWidth * 4;
        }
      });
    });
    odd ^= 1;
  }
  staging.WaitDrained(job);
  if (ptx::FreshThreadIndex() % 128 == 0) staging.Job(shared, job).live = kNoMoreJobs;
  ptx::BarrierArrive(staging.Staged(job));
}

}  // namespace jax_w4moe
