// What an epilogue gets of a finished tile: 64 rows of weights x kTokens tokens of one warpgroup;
// and the way of bf16 results to global memory in whole lines.
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
  int warpgroup, thread;  // thread of the warpgroup
  int expert, slab;       // which 64 rows of weights
  int live;               // tokens that exist
  int64_t first_row;      // the first token's row
  uint32_t scales;        // f32 of each token, in shared memory
  uint32_t staging;       // kTokens * kStagingRow bytes of shared memory, of this warpgroup alone

  __device__ __forceinline__ int Token(int i) const { return i / 4 * 8 + thread % 4 * 2 + i % 2; }
  __device__ __forceinline__ int Row(int i) const {
    return thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8;
  }
  // The scales of the tokens of accumulators i and i + 1; anything for tokens that do not exist.
  __device__ __forceinline__ float2 Scales(int i) const {
    const uint2 pair = ptx::LoadShared64(scales + Token(i) * 4);
    return make_float2(__uint_as_float(pair.x), __uint_as_float(pair.y));
  }
  // All threads of the warpgroup.
  __device__ __forceinline__ void Sync() const { ptx::NamedBarrier(1 + warpgroup, 128); }
};

// Transposes a tile of bf16 through shared memory and stores each token's columns by 16 bytes:
// kOctets blocks of 8 columns per warp, 4 kOctets per token.
//
//   fragment(group, octet)  two tokens' values of one column as a word, for tokens 8 group + 2 t
//                           and + 1 and column 8 octet + g of the warp
//   store(token, octet, v)  the 16 bytes of a live token's 8 columns, octet in [0, 4 kOctets)
template <int kTokens, int kOctets, typename Fragment, typename Store>
__device__ __forceinline__ void StoreTransposed(const EpilogueTile& tile, const Fragment& fragment,
                                                const Store& store) {
  constexpr int kRow = 4 * kOctets;  // 16-byte chunks of a token
  const int warp = tile.thread / 32, lane = tile.thread % 32;
  // Chunks are permuted so that 8 rows of a column of chunks lie in different banks.
  auto chunk_at = [&](int token, int octet) {
    return tile.staging + (token * kRow + (octet ^ token * kRow / 8 % kRow)) * 16;
  };
#pragma unroll
  for (int group = 0; group < kTokens / 8; ++group) {
    const int token = group * 8 + lane % 8;
    if constexpr (kOctets == 2) {
      ptx::StoreMatricesTransposed(chunk_at(token, warp * 2 + lane / 8 % 2), fragment(group, 0),
                                   fragment(group, 1));
    } else {
      ptx::StoreMatrixTransposed(chunk_at(token, warp), fragment(group, 0));
    }
  }
  tile.Sync();
#pragma unroll
  for (int first = 0; first < kTokens * kRow; first += 128) {
    const int token = (first + tile.thread) / kRow, octet = tile.thread % kRow;
    if (token < tile.live) store(token, octet, ptx::LoadShared128(chunk_at(token, octet)));
  }
}

}  // namespace jax_w4moe
