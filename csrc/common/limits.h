// Sizes that handlers check and kernels are written for.
#pragma once

namespace jax_w4moe {

// A packed record: 64 rows x 128 of K; after the codes come a format's scales (docs/layout.md).
inline constexpr int kRecordRows = 64;
inline constexpr int kRecordK = 128;
inline constexpr int kCodeBytes = kRecordRows * kRecordK / 2;

inline constexpr int kMinTileTokens = 32;  // of the grouped GEMM's tiles, at most

// K128 of a token that a CTA can hold as a whole (kernels/one_token.cuh).
constexpr int OneTokenBlocks(int panels) { return panels == 2 ? 64 : 96; }

inline constexpr int kMaxExperts = 1024;
inline constexpr int kMaxTopK = 32;
inline constexpr int kMaxGroupedRows = 1 << 24;  // of expert_mlp and grouped_matmul

}  // namespace jax_w4moe
