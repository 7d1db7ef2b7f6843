// Grouped GEMM on packed 4-bit records: for the rows of every expert, weights times tokens, handed
// to an epilogue in tiles of 64 rows of weights by kTokens tokens.
//
// One persistent CTA per SM: a producer warp streams records and token tiles through a ring of
// shared-memory stages by bulk copies; kWarpgroups math warpgroups own 64 rows of weights each,
// decode them in registers, multiply (weights are A, tokens are N) and add every K128 product in
// f32. The next record is decoded while this one multiplies. docs/numerics.md: R2, R5.
#pragma once

#include <cutlass/arch/reg_reconfig.h>

#include "epilogue/tile.cuh"
#include "formats/mxfp4.cuh"
#include "mainloop/wgmma.cuh"
#include "schedule/grouped.cuh"

namespace jax_w4moe {

struct GroupedGemmParams {
  const uint8_t* records;  // [E, row_blocks, k_blocks, kRecordBytes]
  const uint8_t* image;    // token image, [k_blocks][num_atoms][1024]
  Plan plan;
  int num_experts;
  int row_blocks;
  int k_blocks;
  int num_atoms;
};

template <int kTokens, int kWarpgroups, int kStages>
struct GroupedGemmTile {
  static constexpr int kThreads = 128 * kWarpgroups + 128;
  static constexpr int kTokenBytes = kTokens * 128;
  static constexpr int kWeightBytes = kWarpgroups * kRecordBytes;
  static constexpr int kStagingBytes = kTokens * kStagingRow * 4;

  // Offsets from the first 1,024-byte boundary of dynamic shared memory.
  static constexpr int kWeightsAt = kStages * kTokenBytes;
  static constexpr int kStagingAt = kWeightsAt + kStages * kWeightBytes;
  static constexpr int kTableAt = kStagingAt + kWarpgroups * kStagingBytes;
  static constexpr int kBarriersAt = kTableAt + Mxfp4::kTableBytes;
  static constexpr int kItemStartAt = kBarriersAt + 16 * kStages;
  static constexpr int kSharedBytes = kItemStartAt + 4 * (kMaxExperts + 1) + 1024;
  static_assert(kSharedBytes <= 227 * 1024, "a block has 227 KiB of shared memory");
};

// What one work item is.
struct GroupedGemmItem {
  int expert, first_slab, token_tile, live;
};

template <int kTokens, int kWarpgroups>
__device__ __forceinline__ GroupedGemmItem ItemAt(const int* item_start, int item,
                                                  const GroupedGemmParams& p) {
  const int expert = LastNotAbove(item_start, p.num_experts, item);
  const int size = p.plan.size[expert];
  const int token_tiles = (size + kTokens - 1) / kTokens;
  const int local = item - item_start[expert];
  const int token_tile = local % token_tiles;
  return {expert, local / token_tiles * kWarpgroups, token_tile,
          min(size - token_tile * kTokens, kTokens)};
}

template <int kTokens, int kWarpgroups, int kStages, typename Epilogue>
__global__ void __launch_bounds__(GroupedGemmTile<kTokens, kWarpgroups, kStages>::kThreads, 1)
    GroupedGemm(const __grid_constant__ GroupedGemmParams p,
                const __grid_constant__ Epilogue epilogue) {
  using Tile = GroupedGemmTile<kTokens, kWarpgroups, kStages>;
  extern __shared__ uint8_t unaligned[];
  uint8_t* shared = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(unaligned) + 1023) &
                                               ~uintptr_t{1023});
  const uint32_t tokens = ptx::SharedAddress(shared), weights = tokens + Tile::kWeightsAt;
  const uint32_t full = tokens + Tile::kBarriersAt, empty = full + 8 * kStages;
  int* item_start = reinterpret_cast<int*>(shared + Tile::kItemStartAt);

  for (int i = threadIdx.x; i <= p.num_experts; i += Tile::kThreads) {
    item_start[i] = p.plan.item_start[i];
  }
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
  __syncthreads();
  const int num_items = item_start[p.num_experts];
  const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0), thread = threadIdx.x % 128;

  if (warpgroup == kWarpgroups) {  // producer
    cutlass::arch::warpgroup_reg_dealloc<40>();
    if (thread != 0) return;
    int stage = 0;
    uint32_t parity = 1;
    for (int item = blockIdx.x; item < num_items; item += gridDim.x) {
      const auto [expert, first_slab, token_tile, live] =
          ItemAt<kTokens, kWarpgroups>(item_start, item, p);
      const int slabs = min(kWarpgroups, p.row_blocks - first_slab);
      const uint32_t slab_bytes = p.k_blocks * kRecordBytes;
      const uint8_t* record =
          p.records + (int64_t{expert} * p.row_blocks + first_slab) * slab_bytes;
      const uint8_t* tile =
          p.image + int64_t{p.plan.atom_start[expert] + token_tile * (kTokens / kTokenAtom)} * 1024;
      for (int k = p.k_blocks; k > 0; --k) {
        ptx::BarrierWait(empty + 8 * stage, parity);
        ptx::BarrierArriveExpect(full + 8 * stage, Tile::kTokenBytes + slabs * kRecordBytes);
        for (int s = 0; s < slabs; ++s) {
          ptx::BulkCopy(weights + stage * Tile::kWeightBytes + s * kRecordBytes,
                        record + s * slab_bytes, kRecordBytes, full + 8 * stage, ptx::kEvictFirst);
        }
        ptx::BulkCopy(tokens + stage * Tile::kTokenBytes, tile, Tile::kTokenBytes, full + 8 * stage,
                      ptx::kEvictLast);
        record += kRecordBytes;
        tile += int64_t{p.num_atoms} * 1024;
        if (++stage == kStages) {
          stage = 0;
          parity ^= 1;
        }
      }
    }
    return;
  }

  cutlass::arch::warpgroup_reg_alloc<kWarpgroups == 2 ? 232 : 152>();
  const uint32_t table = tokens + Tile::kTableAt;
  float* staging =
      reinterpret_cast<float*>(shared + Tile::kStagingAt + warpgroup * Tile::kStagingBytes);
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
  for (int item = blockIdx.x; item < num_items; item += gridDim.x) {
    const auto [expert, first_slab, token_tile, live] =
        ItemAt<kTokens, kWarpgroups>(item_start, item, p);
    const int slab = first_slab + warpgroup;
    if (slab >= p.row_blocks) {  // the last slabs do not fill all warpgroups
      for (int k = 0; k < p.k_blocks; ++k) {
        ptx::BarrierWait(full + 8 * stage, parity);
        release(stage);
        advance();
      }
      continue;
    }
    float acc[kTokens / 2], partial[kTokens / 2];
    uint32_t a[2][4][4];
    float scale[2][2];
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) acc[i] = 0.0f;
    auto load = [&](uint32_t (&fragments)[4][4], float (&row_scale)[2]) {
      ptx::BarrierWait(full + 8 * stage, parity);
      Mxfp4::Load(weights + stage * Tile::kWeightBytes + warpgroup * kRecordBytes, thread, table,
                  fragments, row_scale);
    };
    auto step = [&](int now, int next, bool more) {
      const int used = stage;
      MultiplyK128<kTokens>(partial, a[now], tokens + used * Tile::kTokenBytes);
      advance();
      if (more) load(a[next], scale[next]);
      WaitForProducts<kTokens>(partial);
      release(used);
#pragma unroll
      for (int i = 0; i < kTokens / 2; ++i) {
        acc[i] = fmaf(partial[i], scale[now][i / 2 % 2], acc[i]);
      }
    };
    load(a[0], scale[0]);
    int k = 0;
    for (; k + 2 <= p.k_blocks; k += 2) {
      step(0, 1, true);
      step(1, 0, k + 2 < p.k_blocks);
    }
    if (k < p.k_blocks) step(0, 1, false);
    const EpilogueTile tile{warpgroup, thread,
                            expert,    slab,
                            live,      int64_t{p.plan.row_start[expert]} + token_tile * kTokens,
                            staging};
    epilogue.template Store<kTokens>(acc, tile);
  }
}

}  // namespace jax_w4moe
