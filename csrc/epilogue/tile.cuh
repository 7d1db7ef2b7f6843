// What an epilogue gets of a finished tile: 64 rows of weights x kTokens tokens of one warpgroup;
// and the way of bf16 results to global memory in whole lines, through shared memory: a warpgroup
// stages its tile and goes on, another warp stores it.
//
// Accumulator i of a thread (warp w, lane group g, lane of the quad t) belongs to token
// 8 (i / 4) + 2 t + i % 2 and to row 16 w + g + 8 (i / 2 % 2) of the slab (PTX ISA, "Register
// fragments for wgmma.mma_async.m64nNk32", matrix D).
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "common/convert.cuh"
#include "ptx/sm90.cuh"
#include "schedule/rows.cuh"

namespace jax_w4moe {

inline constexpr int kStagingRow = 128;  // bytes of shared memory for a token: 64 bf16

struct EpilogueTile {
  int thread;         // of the warpgroup
  int expert, slab;   // which 64 rows of weights
  int live;           // tokens that exist
  int64_t first_row;  // the first token's row
  uint32_t scales;    // f32 of each token, in shared memory
  uint32_t staging;   // kStagingRow bytes of shared memory for each token

  __device__ __forceinline__ int Token(int i) const { return i / 4 * 8 + thread % 4 * 2 + i % 2; }
  __device__ __forceinline__ int Row(int i) const {
    return thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8;
  }
  // The scales of the tokens of accumulators i and i + 1; anything for tokens that do not exist.
  __device__ __forceinline__ float2 Scales(int i) const {
    const uint2 pair = ptx::LoadShared64(scales + Token(i) * 4);
    return make_float2(__uint_as_float(pair.x), __uint_as_float(pair.y));
  }
};

// Where a chunk of 16 bytes of a token is staged, of `chunks` (4 or 8) that a token has: permuted
// so that 8 rows of a column of chunks lie in different banks.
__device__ __forceinline__ int StagedAt(int token, int chunk, int chunks) {
  return (token * chunks + (chunk ^ (token * chunks / 8 & (chunks - 1)))) * 16;
}

// Stages kTokens tokens as rows of 4 kOctets chunks, kOctets blocks of 8 columns from each warp.
// fragment(group, octet): two tokens' values of one column as a word, for tokens 8 group + 2 t and
// + 1 and column 8 octet + g of the warp.
template <int kTokens, int kOctets, typename Fragment>
__device__ __forceinline__ void StageTransposed(const EpilogueTile& tile,
                                                const Fragment& fragment) {
  const int warp = tile.thread / 32, lane = tile.thread % 32;
#pragma unroll
  for (int group = 0; group < kTokens / 8; ++group) {
    const int token = group * 8 + lane % 8;
    const int chunk = kOctets == 2 ? warp * 2 + lane / 8 % 2 : warp;
    const uint32_t to = tile.staging + StagedAt(token, chunk, 4 * kOctets);
    if constexpr (kOctets == 2) {
      ptx::StoreMatricesTransposed(to, fragment(group, 0), fragment(group, 1));
    } else {
      ptx::StoreMatrixTransposed(to, fragment(group, 0));
    }
  }
}

// What a warpgroup leaves for the warp that stores it.
struct StoreJob {
  int64_t first_row;
  int slab;
  int live;
  int finishes;  // the expert one of whose slabs is complete with this job, or kNoExpert
};

// What an epilogue makes of a job: where the first token's chunk goes, or null; bytes of a row.
struct StoreTarget {
  uint8_t* to;
  int row_bytes;
};

// A warp stores the first `live` tokens that are staged, each lane its column of chunks.
template <int kChunks>
__device__ __forceinline__ void StoreStaged(uint32_t staging, int live, StoreTarget target) {
  constexpr int kAhead = 3, kAtOnce = 32 / kChunks;
  const int chunk = threadIdx.x % kChunks, first = threadIdx.x % 32 / kChunks;
  const int step = kAtOnce * target.row_bytes;
  uint8_t* to = target.to + first * target.row_bytes;
  for (int token = first; token < live; token += kAhead * kAtOnce) {
    uint4 values[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int ahead = token + i * kAtOnce;
      if (ahead < live) values[i] = ptx::LoadShared128(staging + StagedAt(ahead, chunk, kChunks));
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (token + i * kAtOnce < live) *reinterpret_cast<uint4*>(to) = values[i];
      to += step;
    }
  }
}

}  // namespace jax_w4moe
