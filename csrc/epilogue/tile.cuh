// What an epilogue gets of a finished tile: 64 rows of weights x kTokens tokens of one warpgroup.
//
// Accumulator i of a thread (warp w, lane group g, lane of the quad t) belongs to token
// 8 (i / 4) + 2 t + i % 2 and to row 16 w + g + 8 (i / 2 % 2) of the slab (PTX ISA, "Register
// fragments for wgmma.mma_async.m64nNk32", matrix D).
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "ptx/sm90.cuh"

namespace jax_w4moe {

// Staging in shared memory holds one row of f32 per token, padded so that neither the fragments'
// stores nor the rows' loads meet in a bank.
inline constexpr int kStagingRow = 64 + 4;

struct EpilogueTile {
  int warpgroup, thread;  // thread of the warpgroup
  int expert, slab;       // which 64 rows of weights
  int live;               // tokens that exist
  int64_t first_row;      // the first token's row
  float* staging;         // kTokens x kStagingRow, of this warpgroup alone

  __device__ __forceinline__ int Token(int i) const { return i / 4 * 8 + thread % 4 * 2 + i % 2; }
  __device__ __forceinline__ int Row(int i) const {
    return thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8;
  }
  // All threads of the warpgroup.
  __device__ __forceinline__ void Sync() const { ptx::NamedBarrier(1 + warpgroup, 128); }
};

template <typename Out>
__device__ __forceinline__ Out FromFloat(float value) {
  return value;
}
template <>
__device__ __forceinline__ __nv_bfloat16 FromFloat(float value) {
  return __float2bfloat16_rn(value);
}

}  // namespace jax_w4moe
