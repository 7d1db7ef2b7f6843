// What the grouped GEMMs of a call are scheduled by: group sizes that only the device knows, as
// token tiles.
#pragma once

#include <cstdint>

#include "common/limits.h"

namespace jax_w4moe {

// A token tile, given by its expert: items of the expert are numbered from first_tile times the
// number of row tiles on, so item / row_tiles is the number of one of the expert's token tiles.
struct alignas(16) PlannedTile {
  int expert;
  int row_start;   // first row of the expert in the token image, the scales and the output
  int size;        // its rows
  int first_tile;  // token tiles of the experts before
};

// What a grouped GEMM is scheduled by, in global memory. int32: rows per call are bounded by the
// caller.
struct Plan {
  static constexpr int kTickets = 2;
  struct Head {
    int num_tiles;
    int tickets[kTickets];  // for each grouped GEMM, how many items beyond the first are taken
  };

  Head* head;
  int* row_start;  // [E]
  int* size;       // [E]
  // What becomes of an expert's rows, zero at first:
  int* slabs_done;  // [E], slabs of its token tiles whose part of h is there
  int* rows_ready;  // [E], rows that the image of h holds
  PlannedTile* tiles;

  // Each expert has at most one tile that is not full.
  static int64_t Bytes(int64_t num_rows, int64_t num_experts) {
    const int64_t partial = num_rows < num_experts ? num_rows : num_experts;
    return kTilesAt + (num_rows / kMinTileTokens + partial) * int64_t{sizeof(PlannedTile)};
  }
  static Plan At(uint8_t* workspace) {
    int* starts = reinterpret_cast<int*>(workspace + kStartsAt);
    return {reinterpret_cast<Head*>(workspace),
            starts,
            starts + kMaxExperts,
            starts + 2 * kMaxExperts,
            starts + 3 * kMaxExperts,
            reinterpret_cast<PlannedTile*>(workspace + kTilesAt)};
  }

 private:
  static constexpr int kStartsAt = 128;
  static constexpr int kTilesAt = kStartsAt + 4 * 4 * kMaxExperts;
};

// Between two grouped GEMMs of a plan: whose rows they are, and what the first one's slabs and
// token tiles are.
struct Handover {
  const int* row_tags;  // [rows]
  Plan plan;
  bool by_counts;  // expert by expert, or when the first one is complete
  int slabs;
  int tile_tokens;
};

// Few pairs, whose ids say all that a plan does.
inline constexpr int kFewPairs = 32;
struct FewPairs {
  const int* expert_ids;  // [num_pairs]
  int num_pairs;          // at most kFewPairs; 0 for more, which only the plan knows
  int num_experts;
};

}  // namespace jax_w4moe
