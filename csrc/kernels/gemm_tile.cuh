// The tile of a grouped GEMM: its sizes, and how they divide the shared memory of its CTA.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/limits.h"
#include "epilogue/tile.cuh"
#include "formats/formats.h"
#include "mainloop/activations.cuh"
#include "schedule/items.cuh"

namespace jax_w4moe {

inline constexpr int kMaxSharedBytes = 227 * 1024;  // of a block

// Registers of a thread: when a kernel starts, and as its warpgroups share them: those that
// multiply, and the one that loads and stores.
struct ThreadRegisters {
  int start, math, producer;
  constexpr bool Fit(int warpgroups) const {
    return warpgroups * math + producer <= (warpgroups + 1) * start;
  }
};
// Of three math warpgroups: all, or all but 12,288 of an SM, for blocks of the next kernel, which
// wait there for what this one writes.
inline constexpr ThreadRegisters kAllRegisters{128, 152, 56}, kLeavingRegisters{104, 120, 56};

// Decoder_: of formats/; Activations_: of mainloop/activations.cuh; kMaxStages: or one less, where
// a format's records are too large.
template <typename Decoder_, typename Activations_, int kSubtiles_, int kMaxWidth_,
          int kWarpgroups_, int kMaxStages>
struct GroupedGemmTile {
  using Decoder = Decoder_;
  using Activations = Activations_;
  static constexpr int kPanels = Activations::kPanels;
  static constexpr int kGroups = FormatTraits<Decoder>::kGroups;
  static constexpr int kSubtiles = kSubtiles_;  // token sub-tiles that share a decoded record
  static constexpr int kMaxWidth = kMaxWidth_;  // tokens of a sub-tile, at most
  static constexpr int kWarpgroups = kWarpgroups_;
  static constexpr int kTokens = kSubtiles * kMaxWidth;
  static constexpr int kThreads = 128 * kWarpgroups + 128;
  static_assert(kTokens >= kMinTileTokens, "a plan has room for that many only");
  static_assert(kWarpgroups <= 3, "a storing warp each, beside the producer's");

  // Fragments are of two records, the one that is multiplied and the next one. Where sums leave few
  // registers there is one second plane only: the next one's is decoded when products have ended.
  static constexpr int kSums = (kTokens + kMaxWidth) / 2;  // registers of a thread
  static constexpr int kMostRegisters = kWarpgroups == 2 ? 232 : 160;
  static constexpr bool kIsTight = kMostRegisters - kSums < 52;
  static constexpr int kSecondPlanes = kIsTight ? 1 : 2;

  // Small tiles leave registers to the next kernel; decoders that promote more often need them
  // themselves. Where three warpgroups have many sums, those that load and store leave them what
  // they can.
  static constexpr bool kLeavesRegisters = kTokens <= 64 && kGroups == 1;
  static constexpr ThreadRegisters kRegisters =
      kWarpgroups == 2   ? ThreadRegisters{168, kMostRegisters, 40}
      : kIsTight         ? ThreadRegisters{128, kMostRegisters, 32}
      : kLeavesRegisters ? kLeavingRegisters
                         : kAllRegisters;
  static_assert(kRegisters.Fit(kWarpgroups), "there are no more");

  // Shared memory.
  static constexpr int kPanelBytes = kTokens * 128;
  static constexpr int kTokenBytes = kPanels * kPanelBytes;
  static constexpr int kRecordBytes = FormatTraits<Decoder>::kRecordBytes;
  static constexpr int kWeightBytes = kWarpgroups * kRecordBytes;
  static constexpr int kStagingBytes = kMaxWidth * kStagingRow;  // of a sub-tile
  static constexpr int kScaleBytes = kTokens * 4;
  // Items between what the producer loads and what the slowest warpgroup finishes: one per stage,
  // the one being finished and the one being announced.
  static constexpr int Items(int stages) { return stages + 2; }
  // buffers: where a warpgroup stages its sub-tiles in turn.
  static constexpr int SharedBytes(int stages, int buffers) {
    return stages * (kTokenBytes + kWeightBytes) +
           kWarpgroups * (buffers * kStagingBytes + 2 * kScaleBytes) + Decoder::kTableBytes +
           Items(stages) * static_cast<int>(sizeof(WorkItem)) +
           buffers * kWarpgroups * static_cast<int>(sizeof(StoreJob)) +
           16 * (stages + buffers * kWarpgroups);
  }
  static constexpr int kStages =
      SharedBytes(kMaxStages, 1) <= kMaxSharedBytes ? kMaxStages : kMaxStages - 1;
  static constexpr int Buffers(int most) {
    return most == 1 || SharedBytes(kStages, most) <= kMaxSharedBytes ? most : Buffers(most - 1);
  }
  static constexpr int kBuffers = Buffers(kSubtiles);
  static constexpr int kItems = Items(kStages);
  static constexpr int kSharedBytes = SharedBytes(kStages, kBuffers);
  static_assert(kSharedBytes <= kMaxSharedBytes, "the tile does not fit");

  static constexpr int kWeightsAt = kStages * kTokenBytes;
  static constexpr int kStagingAt = kWeightsAt + kStages * kWeightBytes;
  static constexpr int kScalesAt = kStagingAt + kBuffers * kWarpgroups * kStagingBytes;
  static constexpr int kTableAt = kScalesAt + kWarpgroups * 2 * kScaleBytes;
  static constexpr int kItemsAt = kTableAt + Decoder::kTableBytes;
  static constexpr int kJobsAt = kItemsAt + kItems * static_cast<int>(sizeof(WorkItem));
  static constexpr int kBarriersAt =
      kJobsAt + kBuffers * kWarpgroups * static_cast<int>(sizeof(StoreJob));
  static_assert(kItemsAt % 16 == 0, "items are aligned");
  static_assert(kBarriersAt + 16 * (kStages + kBuffers * kWarpgroups) == kSharedBytes,
                "nothing else");

  // The widths that sub-tiles are compiled for, of the multiples of 8: of two warpgroups' sub-tiles
  // up to 64, which is little for them, every other. Two sub-tiles have enough to do from 32 on.
  static constexpr int kMinWidth = kSubtiles > 1 ? 32 : 8;
  template <int kWidth>
  static constexpr bool kIsCompiled =
      kWidth == kMaxWidth ||
      (Decoder::kFewWidths ? kWidth <= 16 || kWidth % 32 == 0
                           : kWarpgroups == 3 || kWidth > 64 || kWidth % 16 == 0);
  // Calls f with the least such width that is not below `width`, as a constant.
  template <int kWidth = kMinWidth, typename F>
  static __device__ __forceinline__ void WithWidth(int width, F&& f) {
    if constexpr (!kIsCompiled<kWidth>) {
      WithWidth<kWidth + 8>(width, f);
    } else if constexpr (kWidth == kMaxWidth) {
      f(std::integral_constant<int, kWidth>{});
    } else if (width <= kWidth) {
      f(std::integral_constant<int, kWidth>{});
    } else {
      WithWidth<kWidth + 8>(width, f);
    }
  }
};

}  // namespace jax_w4moe
