// The producer warp of the grouped GEMM: takes items, streams their records and token tiles through
// the ring of stages.
#pragma once

#include <cstdint>

#include "formats/record.cuh"
#include "kernels/ring.cuh"
#include "ptx/sm90.cuh"
#include "schedule/items.cuh"

namespace jax_w4moe {

struct GroupedGemmParams {
  Records weights;
  const uint8_t* image;    // token image, [k_blocks][panels][image_rows][128]
  const float* row_scale;  // [image_rows]
  Plan plan;
  int64_t image_rows;
  int ticket;                   // which of the plan's
  bool plan_is_old;             // the plan was complete before the preceding kernel began
  FewPairs few_pairs;           // what the plan is made from, complete as well; or none
  bool counts_slabs = false;    // in the plan, as they are stored
  bool waits_for_rows = false;  // by the plan's counts, not for the preceding kernel as a whole
  int num_experts = 0;          // of the plan, where rows are waited for
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

inline constexpr int kFewEarly = 3;  // K128 of weights that are asked for before few pairs' tokens
inline constexpr int kRunSteps = 8;  // K128 of a run of items, about

// The items of a CTA, one after the other: the first run by the CTA's number, the others by ticket.
// A run is of several items where they are short; its ticket is asked for a run ahead, since the
// answer takes as long as several K128.
template <typename Tile>
class ItemQueue {
 public:
  // Waits for the plan, unless it is there already, or is made of few pairs here.
  __device__ __forceinline__ ItemQueue(const GroupedGemmParams& p, bool is_few, bool is_early)
      : p_(p), run_(max(kRunSteps / p.weights.k_blocks, 1)), item_(blockIdx.x * run_) {
    if (!is_early) ptx::WaitForPrecedingKernels();
    const PlanOfFew few(p.few_pairs);
    const int num_tiles = is_few ? few.num_tiles : p.plan.head->num_tiles;
    rows_ = RowTiles(p.weights.row_blocks, Tile::kWarpgroups, num_tiles, gridDim.x);
    num_items_ = num_tiles * rows_.count;
    if (item_ < num_items_) {
      const int tile = item_ / rows_.count;
      planned_ = is_few ? few.Tile(tile) : p.plan.tiles[tile];
      end_of_tile_ = (tile + 1) * rows_.count;
    }
  }
  __device__ __forceinline__ bool HasItem() const { return item_ < num_items_; }
  __device__ __forceinline__ bool HasLongItems() const { return run_ == 1; }
  __device__ __forceinline__ WorkItem Item() const { return ItemAt<Tile>(planned_, rows_, item_); }
  // Whether other token tiles of the expert read the item's weights as well.
  __device__ __forceinline__ bool SharesWeights() const { return planned_.size > Tile::kTokens; }
  // Once for each item, when the plan in memory is there; Advance follows.
  __device__ __forceinline__ void AskAhead() {
    if (in_run_ == 0 && threadIdx.x % 32 == 0) {
      ticket_ = atomicAdd(p_.plan.head->tickets + p_.ticket, 1);
    }
  }
  __device__ __forceinline__ void Advance() {
    ++item_;
    if (++in_run_ == run_) {
      in_run_ = 0;
      item_ = (gridDim.x + __shfl_sync(~0u, ticket_, 0)) * run_;
    }
    if (item_ < end_of_tile_ || !HasItem()) return;
    const int tile = item_ / rows_.count;
    planned_ = p_.plan.tiles[tile];
    end_of_tile_ = (tile + 1) * rows_.count;
  }

 private:
  const GroupedGemmParams& p_;
  int run_, item_;
  int in_run_ = 0;  // items of the run that came before
  RowTiles rows_;
  int num_items_;
  PlannedTile planned_{};
  int end_of_tile_ = 0;  // items of the planned tile are below
  int ticket_ = 0;
};

// Whether the rows of an item are there.
class RowsReady {
 public:
  __device__ __forceinline__ explicit RowsReady(const GroupedGemmParams& p) : p_(p) {}
  // Looks at 32 experts at once: the next items are theirs.
  __device__ __forceinline__ void Wait(const WorkItem& item) {
    if (!p_.waits_for_rows) return ptx::WaitForPrecedingKernels();
    while (item.expert >= ready_) {
      const int expert = item.expert + threadIdx.x % 32;
      const bool is_ready = expert < p_.num_experts &&
                            ptx::LoadAcquire(p_.plan.rows_ready + expert) == p_.plan.size[expert];
      const unsigned there = __ballot_sync(~0u, is_ready);
      ready_ = item.expert + __popc(there & ~(there + 1));  // those before the first that is not
      ptx::GlobalProxyFence();
    }
  }

 private:
  const GroupedGemmParams& p_;
  int ready_ = 0;  // all experts below have their rows
};

// The producer warp: one lane per copy of a stage. Before the preceding kernel has written the
// tokens, the weights of the first stages can be on their way.
template <typename Tile>
__device__ __forceinline__ void LoadItems(const GroupedGemmParams& p, uint32_t shared,
                                          volatile WorkItem* items) {
  constexpr int kWarpgroups = Tile::kWarpgroups, kStages = Tile::kStages;
  constexpr int kRecordBytes = Tile::kRecordBytes;
  static_assert(kStages >= kFewEarly, "the early weights of few pairs have stages");
  const uint32_t full = shared + Tile::kBarriersAt, empty = full + 8 * kStages;
  const int lane = threadIdx.x % 32;
  // Whether the plan was there before the preceding kernel is complete, or what it is made from.
  const bool is_few = p.few_pairs.num_pairs > 0, is_early = p.plan_is_old || is_few;
  const int k_blocks = p.weights.k_blocks;
  ItemQueue<Tile> queue(p, is_few, is_early);
  __syncthreads();  // the barriers are there

  const int panel = lane - kWarpgroups;
  const bool is_tokens = panel >= 0 && panel < Tile::kPanels;
  const uint32_t to =
      shared + (is_tokens ? panel * Tile::kPanelBytes : Tile::kWeightsAt + lane * kRecordBytes);
  const uint32_t stage_bytes = is_tokens ? Tile::kTokenBytes : Tile::kWeightBytes;
  const int64_t k_step = is_tokens ? p.image_rows * 128 * Tile::kPanels : kRecordBytes;
  // Tokens are copied after the early weights; those of few pairs are there soon.
  int early = is_early ? min(k_blocks, is_few ? kFewEarly : kStages) : 0;
  int slot = 0;
  RingPlace<kStages> ring{0, 1};
  RowsReady rows(p);
  while (queue.HasItem()) {
    const WorkItem item = queue.Item();
    const bool copies = is_tokens || lane < item.slabs;
    const uint8_t* from = is_tokens
                              ? p.image + (panel * p.image_rows + item.first_row) * 128
                              : p.weights.Slab(item.expert, item.first_slab + lane, kRecordBytes);
    const uint32_t tile_bytes = item.live * 128;
    const uint32_t bytes = is_tokens ? tile_bytes : kRecordBytes;
    const uint64_t policy =
        is_tokens || queue.SharesWeights() ? ptx::kEvictNormal : ptx::kEvictFirst;
    auto expect = [&](int k) {
      if (lane == 0) {
        if (k == 0) Announce(items[slot], item);
        ptx::BarrierArriveExpect(full + 8 * ring.stage,
                                 Tile::kPanels * tile_bytes + item.slabs * kRecordBytes);
      }
      __syncwarp();
    };
    auto copy = [&] {
      ptx::BulkCopy(to + ring.stage * stage_bytes, from, bytes, full + 8 * ring.stage, policy);
      from += k_step;
    };
    if (early > 0) {
      for (ring.stage = 0; ring.stage < early; ++ring.stage) {
        if (copies && !is_tokens) copy();
      }
      rows.Wait(item);
      for (ring.stage = 0; ring.stage < early; ++ring.stage) {
        expect(ring.stage);
        if (is_tokens) copy();
      }
      --ring.stage;
      ring.Advance();
    } else {
      rows.Wait(item);
    }
    // Not before the wait: dependents take for granted what the preceding kernels wrote.
    ptx::LaunchDependents();
    queue.AskAhead();
    int k = early;
    auto stream_until = [&](int end) {
      for (; k < end; ++k) {
        ptx::BarrierWait(empty + 8 * ring.stage, ring.parity);
        expect(k);
        if (copies) copy();
        ring.Advance();
      }
    };
    // Long before the next item, and where the ticket has had time to come.
    if (queue.HasLongItems()) stream_until((early + k_blocks) / 2);
    queue.Advance();
    stream_until(k_blocks);
    early = 0;
    slot = slot + 1 == Tile::kItems ? 0 : slot + 1;
  }
  ptx::WaitForPrecedingKernels();  // also where there was no item
  ptx::LaunchDependents();
  ptx::BarrierWait(empty + 8 * ring.stage, ring.parity);
  if (lane == 0) {
    Announce(items[slot], {0, 0, 0, 0, 0, kNoMoreItems});
    ptx::BarrierArrive(full + 8 * ring.stage);
  }
}

}  // namespace jax_w4moe
