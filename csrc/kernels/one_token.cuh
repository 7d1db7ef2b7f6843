// A grouped GEMM for one token: the slots' rows times the weights of their experts.
//
// A CTA has slabs of one slot, one behind the other. A producer warp streams their records in
// threes through a ring of stages; of each stage the three math warpgroups take a record each,
// decode it and multiply it with the row, which the CTA itself has made in shared memory, since a
// token image (kernels/token_image.cuh) would be written and read again; a folding warp adds the
// products of a slab in the order of K, as the grouped GEMM does in its accumulators, and finishes
// it. So three warpgroups share the K of a slab, and the sums are the same bit for bit.
#pragma once

#include <cutlass/arch/reg_reconfig.h>

#include <cstdint>
#include <type_traits>

#include "common/limits.h"
#include "epilogue/epilogue.cuh"
#include "formats/record.cuh"
#include "kernels/gemm_tile.cuh"
#include "kernels/ring.cuh"
#include "kernels/row_sources.cuh"
#include "mainloop/wgmma.cuh"
#include "ptx/sm90.cuh"
#include "schedule/one_token.cuh"

namespace jax_w4moe {

template <typename Decoder_, typename Activations_>
struct OneTokenTile {
  using Decoder = Decoder_;
  using Activations = Activations_;
  static constexpr int kPanels = Activations::kPanels;
  static constexpr int kGroups = FormatTraits<Decoder>::kGroups;
  static constexpr int kWarpgroups = 3;
  static constexpr int kMathThreads = 128 * kWarpgroups, kThreads = kMathThreads + 128;
  static constexpr int kTokens = 8;  // of an instruction; the row is the first

  static constexpr ThreadRegisters kRegisters = kGroups == 1 ? kLeavingRegisters : kAllRegisters;
  static_assert(kRegisters.Fit(kWarpgroups), "there are no more");

  // Shared memory.
  static constexpr int kPanelBytes = kTokens * 128;
  static constexpr int kBlockBytes = kPanels * kPanelBytes;  // of the row, for a K128
  static constexpr int kMaxBlocks = OneTokenBlocks(kPanels);
  static constexpr int kRecordBytes = FormatTraits<Decoder>::kRecordBytes;
  // A stage has a record for each warpgroup, and for each the products with it: by groups of K,
  // {product, scale} of rows g and g + 8, 32 such pairs of rows.
  static constexpr int kWeightBytes = kWarpgroups * kRecordBytes;
  static constexpr int kPairBytes = 16, kGroupBytes = 32 * kPairBytes;
  static constexpr int kProductBytes = kWarpgroups * kGroups * kGroupBytes;
  static constexpr int SharedBytes(int stages) {
    return kMaxBlocks * kBlockBytes + stages * (kWeightBytes + kProductBytes + 24) +
           Decoder::kTableBytes + 16 * kWarpgroups + 16;
  }
  static constexpr int Stages(int most) {
    return SharedBytes(most) <= kMaxSharedBytes ? most : Stages(most - 1);
  }
  static constexpr int kStages = Stages(8);
  static_assert(kStages >= 3, "loaded ahead, multiplied, and folded");
  static constexpr int kSharedBytes = SharedBytes(kStages);

  static constexpr int kWeightsAt = kMaxBlocks * kBlockBytes;
  static constexpr int kProductsAt = kWeightsAt + kStages * kWeightBytes;
  static constexpr int kTableAt = kProductsAt + kStages * kProductBytes;
  static constexpr int kMaximaAt = kTableAt + Decoder::kTableBytes;  // of math warps
  static constexpr int kScaleAt = kMaximaAt + 16 * kWarpgroups;      // of the row
  // Barriers: the records are there, they are multiplied, the products are folded.
  static constexpr int kFullAt = kScaleAt + 16, kMultipliedAt = kFullAt + 8 * kStages;
  static constexpr int kEmptyAt = kMultipliedAt + 8 * kStages;
  static_assert(kEmptyAt + 8 * kStages == kSharedBytes, "nothing else");
};

// Writes the row that a CTA multiplies to row 0 of the tile's panels, [k_blocks][panels]; of the
// other rows nobody reads the results. By all math threads.
template <typename Tile>
__device__ __forceinline__ void TakeRow(const OneTokenParams& p, uint32_t shared, int row) {
  using Source = std::conditional_t<Tile::kPanels == 1, Bf16Rows, SplitBf16Rows>;
  constexpr int kThreads = Tile::kMathThreads, kBarrier = 1;
  constexpr int kKept = (Tile::kMaxBlocks * 8 + kThreads - 1) / kThreads;
  const Source source{Bf16Rows{p.rows, p.width, p.order, p.rule}};
  const int chunks = p.weights.k_blocks * 8;
  typename Source::Raw kept[kKept]{};
  uint32_t amax_bits = 0;
#pragma unroll
  for (int i = 0; i < kKept; ++i) {
    const int chunk = threadIdx.x + i * kThreads;
    if (chunk < chunks) kept[i] = source.Load(row, chunk);
    amax_bits = max(amax_bits, Source::AbsMax(kept[i]));
  }
  amax_bits = __reduce_max_sync(~0u, amax_bits);
  const uint32_t maxima = shared + Tile::kMaximaAt;
  if (threadIdx.x % 32 == 0) ptx::StoreShared32(maxima + threadIdx.x / 32 * 4, amax_bits);
  ptx::NamedBarrier(kBarrier, kThreads);
  for (int w = 0; w < kThreads / 32; ++w) {
    amax_bits = max(amax_bits, ptx::LoadShared32(maxima + w * 4));
  }
  float scale;
  const float inv_scale = source.Finish(row, amax_bits, scale);
  if (threadIdx.x == 0) ptx::StoreShared32(shared + Tile::kScaleAt, __float_as_uint(scale));
#pragma unroll
  for (int i = 0; i < kKept; ++i) {
    const int chunk = threadIdx.x + i * kThreads;
    if (chunk >= chunks) break;
    typename Source::Value value;
    Source::Convert(kept[i], inv_scale, value);
    const uint32_t to = shared + chunk / 8 * Tile::kBlockBytes + chunk % 8 * 16;
    if constexpr (Tile::kPanels == 1) {
      ptx::StoreShared128(to, value);
    } else {
      ptx::StoreShared128(to, value[0]);
      ptx::StoreShared128(to + Tile::kPanelBytes, value[1]);
    }
  }
  ptx::SharedStoreFence();
  ptx::NamedBarrier(kBarrier, kThreads);
}

// The producer warp: the records of a CTA's slabs, three to a stage.
template <typename Tile>
__device__ __forceinline__ void LoadRecords(const OneTokenParams& p, uint32_t shared,
                                            const OneTokenShare& share) {
  RingPlace<Tile::kStages> ring{0, 1};
  const uint8_t* from = p.weights.Slab(share.expert, share.first_slab, Tile::kRecordBytes);
  for (int left = share.slabs * p.weights.k_blocks; left > 0; left -= Tile::kWarpgroups) {
    ptx::BarrierWait(shared + Tile::kEmptyAt + 8 * ring.stage, ring.parity);
    if (threadIdx.x % 32 == 0) {
      const uint32_t full = shared + Tile::kFullAt + 8 * ring.stage;
      const uint32_t bytes = min(left, Tile::kWarpgroups) * Tile::kRecordBytes;
      ptx::BarrierArriveExpect(full, bytes);
      ptx::BulkCopy(shared + Tile::kWeightsAt + ring.stage * Tile::kWeightBytes, from, bytes, full,
                    ptx::kEvictFirst);
    }
    from += Tile::kWeightBytes;
    ring.Advance();
  }
}

// A math warpgroup: every third record times the row. With one token its time is latency: the next
// record is on its way to registers while one is decoded, which is while the one before is
// multiplied, whose products are handed over beside the next ones.
template <typename Tile>
class OneTokenMath {
 public:
  __device__ __forceinline__ OneTokenMath(const OneTokenParams& p, uint32_t shared, int warpgroup)
      : shared_(shared),
        products_(shared + Tile::kProductsAt + warpgroup * kGroups * Tile::kGroupBytes +
                  threadIdx.x % 128 / 4 * Tile::kPairBytes),
        warpgroup_(warpgroup),
        k_blocks_(p.weights.k_blocks),
        first_tile_(TokenDescriptor(shared)),
        reader_(threadIdx.x % 128, true) {}

  __device__ __forceinline__ void Multiply(int records) {
    const int stages = (records + Tile::kWarpgroups - 1) / Tile::kWarpgroups;
    const int own = (records - warpgroup_ + Tile::kWarpgroups - 1) / Tile::kWarpgroups;
    if (own > 0) MultiplyOwn(own);
    if (own < stages) {  // the last stage has none for this warpgroup
      Wait();
      HandOver();
    }
  }

 private:
  using Decoder = typename Tile::Decoder;
  using Activations = typename Tile::Activations;
  static constexpr int kGroups = Tile::kGroups, kWidth = Tile::kTokens;
  struct Record {
    uint4 codes[2];
    typename Decoder::Tables tables;
    typename Decoder::Scales scales;
  };

  __device__ __forceinline__ void MultiplyOwn(int own) {
    int block = warpgroup_ % k_blocks_;
    const int step = Tile::kWarpgroups % k_blocks_;
    // Products take registers.
    constexpr int kInFlight = kGroups == 1 ? 2 : 1;
    constexpr bool kLoadsAhead = kGroups <= 4;
    Record records[2];
    typename Decoder::Scales scales[kInFlight];
    Plane a[kInFlight][2];
    float partial[kInFlight][kGroups][kWidth / 2];
    Load(records[0]);
    auto start = [&](auto which, bool loads) {
      constexpr int kWhich = decltype(which)::value, kPlace = kWhich % kInFlight;
      const Record& now = records[kWhich];
      if (loads) Load(records[1 - kWhich]);
      scales[kPlace] = now.scales;
      Decoder::DecodePlane(now.codes[0], now.tables, a[kPlace][0]);
      Decoder::DecodePlane(now.codes[1], now.tables, a[kPlace][1]);
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        cute::warpgroup_fence_operand(a[kPlace][i / 8][i / 4 % 2][i % 4]);
      }
      cute::warpgroup_arrive();
      ForEachGroup<kGroups>([&](auto group) {
        constexpr int kGroup = decltype(group)::value;
        IssueGroup<Activations, kWidth, kGroups, kGroup>(
            partial[kPlace][kGroup], a[kPlace][0], a[kPlace][1],
            first_tile_ + block * (Tile::kBlockBytes / 16), Tile::kTokens * kDescriptorToken);
      });
      cute::warpgroup_commit_batch();
      block += step;
      if (block >= k_blocks_) block -= k_blocks_;
    };
    // Hands the products over, while as many later ones run as `running` says.
    auto finish = [&](auto which, auto running) {
      constexpr int kPlace = decltype(which)::value % kInFlight;
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        WaitForProducts<decltype(running)::value>(partial[kPlace][group]);
      }
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        const float low = Decoder::Scale(scales[kPlace], group, 0);
        const float high = Decoder::Scale(scales[kPlace], group, 1);
        const uint4 v =
            make_uint4(__float_as_uint(partial[kPlace][group][0]), __float_as_uint(low),
                       __float_as_uint(partial[kPlace][group][2]), __float_as_uint(high));
        const uint32_t to = products_ + handed_ * Tile::kProductBytes + group * Tile::kGroupBytes;
        if (threadIdx.x % 4 == 0) ptx::StoreShared128(to, v);  // others have other columns
      }
      HandOver();
    };
    constexpr std::integral_constant<int, 0> zero;
    constexpr std::integral_constant<int, 1> one;
    constexpr bool kMore = true, kLast = false;
    if constexpr (kInFlight == 1) {
      for (int left = own;; --left) {
        start(zero, kLoadsAhead && left > 1);
        finish(zero, zero);
        if (left == 1) return;
        if constexpr (kLoadsAhead) {
          records[0] = records[1];
        } else {
          Load(records[0]);
        }
      }
    }
    if (own == 1) {
      start(zero, kLast);
      return finish(zero, zero);
    }
    // Both halves written out, each with its exit: from a function that both call, and that says
    // whether it was the last, ptxas makes products that wait for one another (C7514).
    start(zero, kMore);
    for (int left = own - 1;; left -= 2) {
      if (left == 1) {
        start(one, kLast);
        finish(zero, one);
        return finish(one, zero);
      }
      start(one, kMore);
      finish(zero, one);
      if (left == 2) {
        start(zero, kLast);
        finish(one, one);
        return finish(zero, zero);
      }
      start(zero, kMore);
      finish(one, one);
    }
  }

  // For the next stage, which it returns.
  __device__ __forceinline__ int Wait() {
    const int stage = ring_.stage;
    ptx::BarrierWait(shared_ + Tile::kFullAt + 8 * stage, ring_.parity);
    ring_.Advance();
    return stage;
  }
  __device__ __forceinline__ void Load(Record& to) {
    const uint32_t record =
        shared_ + Tile::kWeightsAt + Wait() * Tile::kWeightBytes + warpgroup_ * Tile::kRecordBytes;
    to.codes[0] = Codes<0>(record, reader_);
    to.codes[1] = Codes<1>(record, reader_);
    to.tables = Decoder::LoadTables(record, reader_, shared_ + Tile::kTableAt);
    to.scales = Decoder::LoadScales(record, reader_);
  }
  // Says that a stage's products are there, and its record is read.
  __device__ __forceinline__ void HandOver() {
    WarpArrive(shared_ + Tile::kMultipliedAt + 8 * handed_);
    if (++handed_ == Tile::kStages) handed_ = 0;
  }

  uint32_t shared_, products_;
  int warpgroup_, k_blocks_;
  uint32_t first_tile_;
  RecordThread reader_;
  RingPlace<Tile::kStages> ring_;
  int handed_ = 0;  // the stage whose products are handed over next
};

// The folding warp: adds the products of each slab in the order of K, and finishes it. Lane
// 8 w + g has rows 16 w + g and 16 w + g + 8.
template <typename Tile>
__device__ __forceinline__ void FoldProducts(const OneTokenParams& p, const Epilogue& epilogue,
                                             uint32_t shared, const OneTokenShare& share) {
  if (share.slabs == 0) return;
  constexpr int kGroups = Tile::kGroups;
  const int lane = threadIdx.x % 32, k_blocks = p.weights.k_blocks;
  RingPlace<Tile::kStages> ring;
  EpilogueTile tile{};
  tile.thread = lane / 8 * 32 + lane % 8 * 4;
  tile.expert = share.expert;
  tile.slab = share.first_slab;
  tile.first_row = share.slot;
  float2 biases = epilogue.Biases(tile);  // long before they are needed
  float sums[2] = {};
  int block = 0;
  for (int left = share.slabs * k_blocks; left > 0; left -= Tile::kWarpgroups) {
    ptx::BarrierWait(shared + Tile::kMultipliedAt + 8 * ring.stage, ring.parity);
    const uint32_t products =
        shared + Tile::kProductsAt + ring.stage * Tile::kProductBytes + lane * Tile::kPairBytes;
    auto add = [&](int warpgroup) {
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        const uint4 v =
            ptx::LoadShared128(products + (warpgroup * kGroups + group) * Tile::kGroupBytes);
        sums[0] = fmaf(__uint_as_float(v.x), __uint_as_float(v.y), sums[0]);
        sums[1] = fmaf(__uint_as_float(v.z), __uint_as_float(v.w), sums[1]);
      }
    };
    if (block + Tile::kWarpgroups < k_blocks) {  // most often: without a branch
#pragma unroll
      for (int w = 0; w < Tile::kWarpgroups; ++w) add(w);
      block += Tile::kWarpgroups;
    } else {
      const float scale = __uint_as_float(ptx::LoadShared32(shared + Tile::kScaleAt));
      for (int w = 0; w < min(left, Tile::kWarpgroups); ++w) {
        add(w);
        if (++block < k_blocks) continue;
        epilogue.StoreOneToken(sums, biases, scale, tile);
        if (left == w + 1) break;  // the last slab
        ++tile.slab;
        biases = epilogue.Biases(tile);
        sums[0] = sums[1] = 0.0f;
        block = 0;
      }
    }
    WarpArrive(shared + Tile::kEmptyAt + 8 * ring.stage);
    ring.Advance();
  }
}

template <typename Tile>
__global__ void __maxnreg__(Tile::kRegisters.start)
    OneTokenGemm(const __grid_constant__ OneTokenParams p,
                 const __grid_constant__ Epilogue epilogue) {
  extern __shared__ __align__(1024) uint8_t shared_bytes[];
  const uint32_t shared = ptx::SharedAddress(shared_bytes);
  WriteTable<typename Tile::Decoder>(shared_bytes + Tile::kTableAt);
  if (const int s = threadIdx.x; s < Tile::kStages) {
    ptx::BarrierInit(shared + Tile::kFullAt + 8 * s, 1);
    ptx::BarrierInit(shared + Tile::kMultipliedAt + 8 * s, 4 * kArrivingLanes * Tile::kWarpgroups);
    ptx::BarrierInit(shared + Tile::kEmptyAt + 8 * s, kArrivingLanes);
    ptx::BarrierInitFence();
  }
  const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);
  if (warpgroup == Tile::kWarpgroups) {
    cutlass::arch::warpgroup_reg_dealloc<Tile::kRegisters.producer>();
    const OneTokenShare share(p, OneTokenShare::LaneExpert(p));
    const int warp = __shfl_sync(~0u, threadIdx.x % 128 / 32, 0);
    __syncthreads();
    if (warp == 0) {
      ptx::LaunchDependents();  // they wait for all of this kernel
      LoadRecords<Tile>(p, shared, share);
    } else if (warp == 1) {
      FoldProducts<Tile>(p, epilogue, shared, share);
    }
    return;
  }
  cutlass::arch::warpgroup_reg_alloc<Tile::kRegisters.math>();
  const int lane_expert = OneTokenShare::LaneExpert(p);
  __syncthreads();
  if (p.is_first) TakeRow<Tile>(p, shared, 0);
  const OneTokenShare share(p, lane_expert);
  ptx::WaitForPrecedingKernels();
  if (!p.is_first && share.slabs > 0) TakeRow<Tile>(p, shared, share.slot);
  OneTokenMath<Tile>(p, shared, warpgroup).Multiply(share.slabs * p.weights.k_blocks);
}

}  // namespace jax_w4moe
