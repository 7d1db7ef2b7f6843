// Writes rows as a token image. The kernel has two policies: the Source says what a row holds
// (bf16, quantised here or split in two; or E4M3), the Placement where it goes: to k rows after
// routing, or to its own.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "common/scale_rule.h"
#include "formats/formats.h"
#include "kernels/plan.cuh"
#include "kernels/quantize_row.cuh"
#include "kernels/route.cuh"
#include "ptx/sm90.cuh"
#include "schedule/plan.h"
#include "schedule/rows.cuh"

namespace jax_w4moe {

inline constexpr int kImageThreads = 128;

// The K of word t of a chunk of the image, which is for half chunk % 2 of an instruction.
__device__ __forceinline__ int ChunkK(KOrder order, int chunk, int t) {
  const bool is_by_lane = order == KOrder::kByLane;
  return chunk / 8 * 128 + (is_by_lane ? 32 : 4) * t + (is_by_lane ? 4 : 16) * (chunk % 8);
}

// --- sources: rows of `width` values, a multiple of 32 ---
//
// Load: what a chunk of the image is made from. AbsMax: its part of Finish's amax_bits. Finish:
// what chunks are multiplied by, and the row's scale. Convert: a chunk as the image has it.

// bf16, quantised by a rule.
struct Bf16Rows {
  const __nv_bfloat16* x;
  int width;
  KOrder order;
  ScaleRule rule;

  struct Raw {
    uint2 fours[4];
  };
  __device__ __forceinline__ Raw Load(int64_t row, int chunk) const {
    Raw raw;
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      const int k = ChunkK(order, chunk, t);
      raw.fours[t] = k < width ? *reinterpret_cast<const uint2*>(x + row * width + k) : uint2{0, 0};
    }
    return raw;
  }
  static __device__ __forceinline__ uint32_t AbsMax(const Raw& raw) {
    const uint2(&f)[4] = raw.fours;
    return max(AbsMaxBits(make_uint4(f[0].x, f[0].y, f[1].x, f[1].y)),
               AbsMaxBits(make_uint4(f[2].x, f[2].y, f[3].x, f[3].y)));
  }
  __device__ __forceinline__ float Finish(int64_t, uint32_t amax_bits, float& scale) const {
    if (rule.fixed > 0.0f) {
      scale = rule.fixed;
      return __fdiv_rn(1.0f, rule.fixed);
    }
    const uint32_t row_bits = TeamMax<kImageThreads>(amax_bits);
    return rule.pow2 ? FinishPow2Scale(row_bits, &scale) : FinishScale(row_bits, true, &scale);
  }
  using Value = uint4;
  static __device__ __forceinline__ void Convert(const Raw& raw, float inv_scale, Value& value) {
    value = make_uint4(Quantize(raw.fours[0], inv_scale), Quantize(raw.fours[1], inv_scale),
                       Quantize(raw.fours[2], inv_scale), Quantize(raw.fours[3], inv_scale));
  }
};

// bf16 as the sum of two FP8 numbers: E5M2 has three significant bits, E4M3 four more and the sign
// of what the first left. With the row's largest magnitude in [2^11, 2^12) a value down to 2^-2 of
// these units is exact; a smaller one is right to 2^-10, which is 2^-21 of the largest at most.
struct SplitBf16Rows : Bf16Rows {
  __device__ __forceinline__ Raw Load(int64_t row, int chunk) const {
    Raw raw = Bf16Rows::Load(row, chunk);
    if (rule.per_128) RoundPer128(raw);
    return raw;
  }
  // A power of two; of a row that holds an infinity or NaN, NaN.
  __device__ __forceinline__ float Finish(int64_t, uint32_t amax_bits, float& scale) const {
    const uint32_t exponent = max(TeamMax<kImageThreads>(amax_bits), kMinAmaxBits) >> 23;
    scale = __uint_as_float((exponent - 11) << 23);
    return __uint_as_float(exponent == 255 ? 0x7fffffffu : (254 + 11 - exponent) << 23);
  }
  using Value = uint4[2];  // what the first leaves, the first
  static __device__ __forceinline__ void Convert(const Raw& raw, float inv_scale, Value& value) {
    uint2 words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i] = Split(raw.fours[i], inv_scale);
    value[0] = make_uint4(words[0].x, words[1].x, words[2].x, words[3].x);
    value[1] = make_uint4(words[0].y, words[1].y, words[2].y, words[3].y);
  }

 private:
  static __device__ __forceinline__ uint2 Split(uint2 four, float inv_scale) {
    const float values[4] = {
        LowBf16ToFloat(four.x) * inv_scale, HighBf16ToFloat(four.x) * inv_scale,
        LowBf16ToFloat(four.y) * inv_scale, HighBf16ToFloat(four.y) * inv_scale};
    const uint32_t high = PackFp8x4<E5m2>(values[0], values[1], values[2], values[3]);
    float first[4];
    UnpackFp8x4<E5m2>(high, first);
    return {PackFp8x4<E4m3>(values[0] - first[0], values[1] - first[1], values[2] - first[2],
                            values[3] - first[3]),
            high};
  }
  // To E4M3 under a scale that is a power of two, and back. Eight neighbouring threads have 128
  // values.
  static __device__ __forceinline__ void RoundPer128(Raw& raw) {
    uint32_t amax_bits = AbsMax(raw);
    const uint32_t mask = 0xffu << (threadIdx.x % 32 / 8 * 8);
#pragma unroll
    for (int lanes = 1; lanes < 8; lanes *= 2) {
      amax_bits = max(amax_bits, __shfl_xor_sync(mask, amax_bits, lanes));
    }
    float scale;
    const float inv_scale = FinishPow2Scale(amax_bits, &scale);
#pragma unroll
    for (uint2& four : raw.fours) {
      float values[4];
      UnpackFp8x4<E4m3>(Quantize(four, inv_scale), values);
      four = {PackBf16(values[0] * scale, values[1] * scale),
              PackBf16(values[2] * scale, values[3] * scale)};
    }
  }
};

// E4M3 with a scale per row.
struct Fp8Rows {
  const uint8_t* x;
  const float* x_scale;
  int width;
  KOrder order;

  using Raw = uint4;
  __device__ __forceinline__ Raw Load(int64_t row, int chunk) const {
    uint32_t words[4] = {0, 0, 0, 0};
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      const int k = ChunkK(order, chunk, t);
      if (k < width) words[t] = *reinterpret_cast<const uint32_t*>(x + row * width + k);
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
  }
  static __device__ __forceinline__ uint32_t AbsMax(const Raw&) { return 0; }
  __device__ __forceinline__ float Finish(int64_t row, uint32_t, float& scale) const {
    scale = x_scale[row];
    return 1.0f;
  }
  using Value = uint4;
  static __device__ __forceinline__ void Convert(const Raw& raw, float, Value& value) {
    value = raw;
  }
};

// --- placements ---
//
// kLaunchFirst: the next kernel may start before the preceding one is complete. It may not where it
// takes a plan for granted that the preceding one makes.

inline constexpr int kMaxCountedPairs = 1024;  // more are placed by route.cuh's kernels

// Few tokens to the rows of their experts, by counting: the row of a pair is the number of pairs
// with a smaller expert, or with the same expert and an earlier place. One more block writes the
// plan.
struct PlaceByCounting {
  const int* topk_ids;  // [num_pairs]
  int num_pairs, top_k, num_experts, tile_tokens;
  Plan plan;
  Place* places;   // [num_pairs], written
  int* row_phase;  // [num_pairs], written

  using Builder = PlanBuilder<kImageThreads>;
  static constexpr bool kLaunchFirst = true;
  union Shared {
    Place place[kMaxTopK];
    struct {
      int count[kMaxExperts + 1];
      Builder::Shared scratch;
    } build;
  };

  __device__ __forceinline__ int Count() const { return top_k; }
  __device__ __forceinline__ bool HasRow(int token) const { return token * top_k < num_pairs; }
  __device__ __forceinline__ bool Begin(Shared& shared, int token) const {
    if (!HasRow(token)) {
      BuildPlan(shared);
      return false;
    }
    const int lane = threadIdx.x % 32;
    for (int slot = threadIdx.x / 32; slot < top_k; slot += kImageThreads / 32) {
      const int pair = token * top_k + slot;
      const int expert = ValidExpert(topk_ids[pair], num_experts);
      int smaller = 0, earlier = 0;
      for (int other = lane; other < num_pairs; other += 32) {
        const int its = ValidExpert(topk_ids[other], num_experts);
        smaller += its < expert;
        earlier += its == expert && other < pair;
      }
      smaller = __reduce_add_sync(~0u, smaller);
      earlier = __reduce_add_sync(~0u, earlier);
      if (lane == 0) {
        const int row = smaller + earlier, phase = expert < num_experts ? earlier % 8 : -1;
        shared.place[slot] = places[pair] = {row, phase};
        row_phase[row] = phase;
      }
    }
    __syncthreads();
    return true;
  }
  __device__ __forceinline__ Place At(const Shared& shared, int, int slot) const {
    return shared.place[slot];
  }

 private:
  __device__ __forceinline__ void BuildPlan(Shared& shared) const {
    int (&count)[kMaxExperts + 1] = shared.build.count;
    for (int e = threadIdx.x; e <= kMaxExperts; e += kImageThreads) count[e] = 0;
    __syncthreads();
    for (int pair = threadIdx.x; pair < num_pairs; pair += kImageThreads) {
      const int expert = ValidExpert(topk_ids[pair], num_experts);
      if (expert < num_experts) atomicAdd(&count[expert], 1);  // integers: exact
    }
    __syncthreads();
    int size[Builder::kItems], start[Builder::kItems];
#pragma unroll
    for (int i = 0; i < Builder::kItems; ++i) size[i] = count[threadIdx.x * Builder::kItems + i];
    Builder::Starts(shared.build.scratch, size, start);
    Builder::Write(shared.build.scratch, size, start, num_experts, tile_tokens, plan);
  }
};

// Tokens to the rows that RankPairs gave them.
struct PlaceByTable {
  const Place* places;  // [tokens, top_k]
  int top_k;
  int* row_phase;  // written

  static constexpr bool kLaunchFirst = false;
  struct Shared {};

  __device__ __forceinline__ int Count() const { return top_k; }
  __device__ __forceinline__ bool HasRow(int) const { return true; }
  __device__ __forceinline__ bool Begin(Shared&, int token) const {
    if (threadIdx.x < top_k) {
      const Place place = places[token * top_k + threadIdx.x];
      row_phase[place.row] = place.phase;
    }
    return true;
  }
  __device__ __forceinline__ Place At(const Shared&, int token, int slot) const {
    return places[token * top_k + slot];
  }
};

// Rows that stay where they are, with their phases known.
struct PlaceInPlace {
  const int* row_phase;

  static constexpr bool kLaunchFirst = true;
  struct Shared {};

  __device__ __forceinline__ int Count() const { return 1; }
  __device__ __forceinline__ bool HasRow(int row) const { return row_phase[row] >= 0; }
  __device__ __forceinline__ bool Begin(Shared&, int row) const { return HasRow(row); }
  __device__ __forceinline__ Place At(const Shared&, int row, int) const {
    return {row, row_phase[row]};
  }
};

// Rows that stay where they are, grouped as a plan says. Rows of no group get a zero row in `out`.
struct PlaceByGroup {
  Plan plan;
  int num_experts;
  int rows_per_expert;  // as in PlanGroups
  int* row_phase;       // written; may be null
  uint8_t* out;         // the op's result
  int64_t out_bytes;    // of a row, a multiple of 16

  static constexpr bool kLaunchFirst = false;
  struct Shared {
    int before[kImageThreads / 32];
    int phase;
  };

  __device__ __forceinline__ int Count() const { return 1; }
  __device__ __forceinline__ bool HasRow(int) const { return true; }
  __device__ __forceinline__ bool Begin(Shared& shared, int row) const {
    int expert;
    if (rows_per_expert) {
      expert = row / rows_per_expert;
    } else {  // the last that starts at or before the row; empty ones share their starts
      int count = 0;
      for (int e = threadIdx.x; e < num_experts; e += kImageThreads) {
        count += plan.row_start[e] <= row;
      }
      count = __reduce_add_sync(~0u, count);
      if (threadIdx.x % 32 == 0) shared.before[threadIdx.x / 32] = count;
      __syncthreads();
      expert = -1;
#pragma unroll
      for (int w = 0; w < kImageThreads / 32; ++w) expert += shared.before[w];
    }
    const int in_expert = row - plan.row_start[expert];
    const bool live = in_expert < plan.size[expert];
    if (threadIdx.x == 0) {
      shared.phase = live ? in_expert % 8 : -1;
      if (row_phase) row_phase[row] = shared.phase;
    }
    __syncthreads();
    if (live) return true;
    uint4* zeros = reinterpret_cast<uint4*>(out + row * out_bytes);
    for (int i = threadIdx.x; i < out_bytes / 16; i += kImageThreads) {
      zeros[i] = make_uint4(0, 0, 0, 0);
    }
    return false;
  }
  __device__ __forceinline__ Place At(const Shared& shared, int row, int) const {
    return {row, shared.phase};
  }
};

inline constexpr int kKeptChunks = 2;  // of a thread: rows of up to 4,096 values are read once

// One block per row of the source.
template <typename Source, typename Placement>
__global__ void __launch_bounds__(kImageThreads)
    WriteTokenImage(Source source, Placement placement, TokenImage image) {
  __shared__ typename Placement::Shared shared;
  const int row = blockIdx.x, chunks = (source.width + 127) / 128 * 8;
  if constexpr (Placement::kLaunchFirst) ptx::LaunchDependents();
  ptx::WaitForPrecedingKernels();
  if constexpr (!Placement::kLaunchFirst) ptx::LaunchDependents();
  typename Source::Raw kept[kKeptChunks]{};
  if (placement.HasRow(row)) {  // before it is known where to: loads take time
#pragma unroll
    for (int i = 0; i < kKeptChunks; ++i) {
      const int chunk = threadIdx.x + i * kImageThreads;
      if (chunk < chunks) kept[i] = source.Load(row, chunk);
    }
  }
  if (!placement.Begin(shared, row)) return;
  uint32_t amax_bits = 0;
#pragma unroll
  for (int i = 0; i < kKeptChunks; ++i) amax_bits = max(amax_bits, Source::AbsMax(kept[i]));
  constexpr int kKept = kKeptChunks * kImageThreads;
  for (int chunk = threadIdx.x + kKept; chunk < chunks; chunk += kImageThreads) {
    amax_bits = max(amax_bits, Source::AbsMax(source.Load(row, chunk)));
  }
  float scale;
  const float inv_scale = source.Finish(row, amax_bits, scale);
  if (threadIdx.x < placement.Count()) {
    const Place place = placement.At(shared, row, threadIdx.x);
    if (place.phase >= 0) image.row_scale[place.row] = scale;
  }
  auto write = [&](int chunk, const typename Source::Raw& raw) {
    typename Source::Value value;
    Source::Convert(raw, inv_scale, value);
    for (int slot = 0; slot < placement.Count(); ++slot) {
      const Place place = placement.At(shared, row, slot);
      if (place.phase >= 0) image.Write(place, chunk, value);
    }
  };
#pragma unroll
  for (int i = 0; i < kKeptChunks; ++i) {
    const int chunk = threadIdx.x + i * kImageThreads;
    if (chunk < chunks) write(chunk, kept[i]);
  }
  for (int chunk = threadIdx.x + kKept; chunk < chunks; chunk += kImageThreads) {
    write(chunk, source.Load(row, chunk));
  }
}

}  // namespace jax_w4moe
