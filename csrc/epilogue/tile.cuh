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

namespace jax_w4moe {

inline constexpr int kStagingRow = 128;  // bytes of shared memory for a token: 64 bf16

struct EpilogueTile {
  int thread;         // of the warpgroup
  int expert, slab;   // which 64 rows of weights
  int live;           // tokens that exist
  int64_t first_row;  // the first token's row
  uint32_t scales;    // f32 of each token, in shared memory
  uint32_t staging;   // kTokens * kStagingRow bytes of shared memory

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

// What is staged: tokens as rows of 4 kOctets chunks of 16 bytes, kOctets blocks of 8 columns from
// each warp.
template <int kOctets>
struct Staged {
  static constexpr int kChunks = 4 * kOctets;  // of a token
  uint32_t address;

  // Chunks are permuted so that 8 rows of a column of chunks lie in different banks.
  __device__ __forceinline__ uint32_t At(int token, int chunk) const {
    return address + (token * kChunks + (chunk ^ token * kChunks / 8 % kChunks)) * 16;
  }

  // fragment(group, octet): two tokens' values of one column as a word, for tokens 8 group + 2 t
  // and + 1 and column 8 octet + g of the warp.
  template <int kTokens, typename Fragment>
  __device__ __forceinline__ void WriteTransposed(int thread, const Fragment& fragment) const {
    const int warp = thread / 32, lane = thread % 32;
#pragma unroll
    for (int group = 0; group < kTokens / 8; ++group) {
      const int token = group * 8 + lane % 8;
      if constexpr (kOctets == 2) {
        ptx::StoreMatricesTransposed(At(token, warp * 2 + lane / 8 % 2), fragment(group, 0),
                                     fragment(group, 1));
      } else {
        ptx::StoreMatrixTransposed(At(token, warp), fragment(group, 0));
      }
    }
  }

  // A warp stores the first `live` tokens; `to` is where the first one's chunk lane % kChunks goes.
  __device__ __forceinline__ void Store(int lane, int live, uint8_t* to, int64_t row_bytes) const {
    constexpr int kAhead = 4, kTokensAtOnce = 32 / kChunks;
    const int chunk = lane % kChunks;
    to += lane / kChunks * row_bytes;
    for (int token = lane / kChunks; token < live; token += kAhead * kTokensAtOnce) {
      uint4 values[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int ahead = token + i * kTokensAtOnce;
        if (ahead < live) values[i] = ptx::LoadShared128(At(ahead, chunk));
      }
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (token + i * kTokensAtOnce < live) *reinterpret_cast<uint4*>(to) = values[i];
        to += kTokensAtOnce * row_bytes;
      }
    }
  }
};

}  // namespace jax_w4moe
