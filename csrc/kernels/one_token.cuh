// The math of a grouped GEMM for one token: its row as WGMMA reads it, made by the CTA that
// multiplies it, since a token image (kernels/token_image.cuh) would be written and read again; and
// the products.
#pragma once

#include <cstdint>
#include <type_traits>

#include "kernels/load_items.cuh"
#include "kernels/row_sources.cuh"
#include "mainloop/wgmma.cuh"
#include "ptx/sm90.cuh"

namespace jax_w4moe {

// The row that a CTA has, by its math threads: 0 to kThreads - 1, all of which call all functions.
template <typename Tile, bool = Tile::kIsOneToken>
class OneTokenRow {
 public:
  static constexpr int kThreads = 128 * Tile::kWarpgroups, kBarrier = Tile::kWarpgroups + 1;

  __device__ __forceinline__ explicit OneTokenRow(const OneTokenParams& params, uint32_t shared)
      : p_(params), shared_(shared), source_{Bf16Rows{p_.rows, p_.width, p_.order, p_.rule}} {}

  // Writes a row, unless it is there, to row 0 of the tile's panels, [k_blocks][panels]; of the
  // other rows nobody reads the results.
  __device__ __forceinline__ void Take(int64_t row) {
    if (row == row_) return;
    row_ = row;
    typename Source::Raw kept[kKept]{};
    uint32_t amax_bits = 0;
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
      const int chunk = threadIdx.x + i * kThreads;
      if (chunk < Chunks()) kept[i] = source_.Load(row, chunk);
      amax_bits = max(amax_bits, Source::AbsMax(kept[i]));
    }
    amax_bits = __reduce_max_sync(~0u, amax_bits);
    const uint32_t maxima = shared_ + Tile::kMaximaAt;
    if (threadIdx.x % 32 == 0) ptx::StoreShared32(maxima + threadIdx.x / 32 * 4, amax_bits);
    // The products with the row before have been waited for, and the maxima are there.
    ptx::NamedBarrier(kBarrier, kThreads);
    for (int w = 0; w < kThreads / 32; ++w) {
      amax_bits = max(amax_bits, ptx::LoadShared32(maxima + w * 4));
    }
    const float inv_scale = source_.Finish(row, amax_bits, scale);
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
      const int chunk = threadIdx.x + i * kThreads;
      if (chunk >= Chunks()) break;
      typename Source::Value value;
      Source::Convert(kept[i], inv_scale, value);
      const uint32_t to = shared_ + chunk / 8 * Tile::kTokenBytes + chunk % 8 * 16;
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

  float scale;  // of the row that was written

 private:
  using Source = std::conditional_t<Tile::kPanels == 1, Bf16Rows, SplitBf16Rows>;
  static constexpr int kKept = (OneTokenBlocks(Tile::kPanels) * 8 + kThreads - 1) / kThreads;

  __device__ __forceinline__ int Chunks() const { return p_.weights.k_blocks * 8; }

  const OneTokenParams& p_;
  uint32_t shared_;
  Source source_;
  int64_t row_ = -1;
};
template <typename Tile>
struct OneTokenRow<Tile, false> {
  __device__ __forceinline__ OneTokenRow(const GroupedGemmParams&, uint32_t) {}
};

// An item's products with the row, added to acc. With one token a warpgroup's time is latency: the
// next record is on its way to registers while one is decoded, which is while the one before is
// multiplied, whose sums are added beside the next product. take() waits for the next record in
// shared memory, release() ends its use.
template <typename Tile, typename Take, typename Release>
__device__ __forceinline__ void MultiplyOneToken(float (&acc)[4], int k_blocks, uint32_t first_tile,
                                                 const RecordThread& thread, uint32_t table,
                                                 const Take& take, const Release& release) {
  using Decoder = typename Tile::Decoder;
  using Activations = typename Tile::Activations;
  constexpr int kGroups = Tile::kGroups, kWidth = 8;
  struct Record {
    uint4 codes[2];
    typename Decoder::Tables tables;
    typename Decoder::Scales scales;
  };
  auto load = [&] {
    const uint32_t record = take();
    return Record{{Codes<0>(record, thread), Codes<1>(record, thread)},
                  Decoder::LoadTables(record, thread, table),
                  Decoder::LoadScales(record, thread)};
  };
  Record now = load();
  typename Decoder::Scales scales[2];
  Plane a[2][2];
  float partial[2][kGroups][kWidth / 2];
  // K128 `block`, which is `now`.
  auto start = [&](auto which, int block, auto is_last) {
    constexpr int kWhich = decltype(which)::value;
    constexpr bool kIsLast = decltype(is_last)::value;
    Record next;
    if constexpr (!kIsLast) next = load();
    Decoder::DecodePlane(now.codes[0], now.tables, a[kWhich][0]);
    Decoder::DecodePlane(now.codes[1], now.tables, a[kWhich][1]);
    scales[kWhich] = now.scales;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      cute::warpgroup_fence_operand(a[kWhich][i / 8][i / 4 % 2][i % 4]);
    }
    cute::warpgroup_arrive();
    ForEachGroup<kGroups>([&](auto group) {
      constexpr int kGroup = decltype(group)::value;
      IssueGroup<Activations, kWidth, kGroups, kGroup>(
          partial[kWhich][kGroup], a[kWhich][0], a[kWhich][1],
          first_tile + block * Tile::kPanels * Tile::kTokens * kDescriptorToken,
          Tile::kTokens * kDescriptorToken);
    });
    cute::warpgroup_commit_batch();
    if constexpr (!kIsLast) {
      release();
      now = next;
    }
  };
  // Adds the products, while as many later ones run as `running` says.
  auto finish = [&](auto which, auto running) {
    constexpr int kWhich = decltype(which)::value;
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      WaitForProducts<decltype(running)::value>(partial[kWhich][group]);
    }
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
#pragma unroll
      for (int j = 0; j < kWidth / 2; ++j) {
        acc[j] = fmaf(partial[kWhich][group][j], Decoder::Scale(scales[kWhich], group, j / 2 % 2),
                      acc[j]);
      }
    }
  };
  constexpr std::integral_constant<int, 0> zero;
  constexpr std::integral_constant<int, 1> one;
  constexpr std::true_type last;
  constexpr std::false_type more;
  release();
  if constexpr (kGroups > 4) {  // registers are scarce
    for (int block = 0; block + 1 < k_blocks; ++block) {
      start(zero, block, more);
      finish(zero, zero);
    }
    start(zero, k_blocks - 1, last);
    return finish(zero, zero);
  }
  if (k_blocks == 1) {
    start(zero, 0, last);
    return finish(zero, zero);
  }
  start(zero, 0, more);
  for (int block = 1;; block += 2) {
    if (block + 1 == k_blocks) {
      start(one, block, last);
      finish(zero, one);
      return finish(one, zero);
    }
    start(one, block, more);
    finish(zero, one);
    if (block + 2 == k_blocks) {
      start(zero, block + 1, last);
      finish(one, one);
      return finish(zero, zero);
    }
    start(zero, block + 1, more);
    finish(one, one);
  }
}

}  // namespace jax_w4moe
