// INT4 records with an f32 scale per 128 of K on the device: from shared memory to WGMMA A
// fragments, exactly.
//
// The byte map is docs/layout.md; jax_w4moe/formats/{layout,int4}.py write it. A nibble 2 m + s, s
// the sign, is the value m, or -m - 1. What a decoder has is said in formats/mxfp4.cuh.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "formats/record.cuh"
#include "mainloop/activations.cuh"
#include "ptx/sm90.cuh"

namespace jax_w4moe {

// Without a table.
struct Int4Scales {
  static constexpr int kTableBytes = 0;
  static __device__ __forceinline__ uint8_t TableByte(int) { return 0; }

  struct Tables {};
  static __device__ __forceinline__ Tables LoadTables(uint32_t, int, uint32_t) { return {}; }
};

template <typename Activations>
struct Int4G128;

template <>
struct Int4G128<Fp8Activations> : Int4Scales {
  using Activations = Fp8Activations;

  static __device__ __forceinline__ void LoadScale(uint32_t record, int thread, float (&scale)[2]) {
    const uint2 words = ScaleWords(record, thread);
    scale[0] = __uint_as_float(words.x);
    scale[1] = __uint_as_float(words.y);
  }

  template <int kPlane>
  static __device__ __forceinline__ void LoadPlane(uint32_t record, int thread, const Tables&,
                                                   uint32_t (&a)[4][4]) {
    const uint4 codes = Codes<kPlane>(record, thread);
    Decode(codes.x, a[2 * kPlane][0], a[2 * kPlane][2]);
    Decode(codes.y, a[2 * kPlane][1], a[2 * kPlane][3]);
    Decode(codes.z, a[2 * kPlane + 1][0], a[2 * kPlane + 1][2]);
    Decode(codes.w, a[2 * kPlane + 1][1], a[2 * kPlane + 1][3]);
  }

 private:
  // Eight codes to two registers of four E4M3.
  static __device__ __forceinline__ void Decode(uint32_t codes, uint32_t& first, uint32_t& second) {
    first = DecodeFour(codes);
    second = DecodeFour(codes >> 4);
  }
  // E4M3 bytes from 0 to 16 count up in steps: 2 (m + s) of them, and the sign bit.
  static __device__ __forceinline__ uint32_t DecodeFour(uint32_t nibbles) {
    return (nibbles & 0x01010101u) * 0x82u + (nibbles & 0x0e0e0e0eu);
  }
};

template <>
struct Int4G128<Bf16Activations> : Int4Scales {
  using Activations = Bf16Activations;

  // The record's scales are for E4M3 operands, which are 2^-8 of these.
  static __device__ __forceinline__ void LoadScale(uint32_t record, int thread, float (&scale)[2]) {
    const uint2 words = ScaleWords(record, thread);
    scale[0] = __uint_as_float(words.x) * 0x1p-8f;
    scale[1] = __uint_as_float(words.y) * 0x1p-8f;
  }

  template <int kPlane>
  static __device__ __forceinline__ void LoadPlane(uint32_t record, int thread, const Tables&,
                                                   uint32_t (&a)[4][4]) {
    const uint4 codes = Codes<kPlane>(record, thread);
    Decode<0>(codes.x, a[0], a[1]);
    Decode<1>(codes.y, a[0], a[1]);
    Decode<0>(codes.z, a[2], a[3]);
    Decode<1>(codes.w, a[2], a[3]);
  }

 private:
  // Eight codes to four registers of two bf16: kHigh and kHigh + 2 of two instructions.
  template <int kHigh>
  static __device__ __forceinline__ void Decode(uint32_t codes, uint32_t (&first)[4],
                                                uint32_t (&second)[4]) {
    // Nibbles 2 q + s, q the low three bits in two's complement: the value is q - 8 s.
    const uint32_t nibbles = codes ^ (codes & 0x11111111u) * 14u;
    const uint32_t low = ptx::Permute(nibbles, 0, 0x4140), high = ptx::Permute(nibbles, 0, 0x4342);
    first[kHigh] = Difference(low, low << 4);
    first[kHigh + 2] = Difference(high, high << 4);
    second[kHigh] = Difference(low >> 4, low);
    second[kHigh + 2] = Difference(high >> 4, high);
  }
  // bf16 of (64 + q) - (64 + 8 s), exactly: q from bits 1 to 3 of both halves, s from bit 4.
  static __device__ __forceinline__ uint32_t Difference(uint32_t values, uint32_t signs) {
    const uint32_t plus = ptx::AndOr(values, 0x000e000eu, 0x42804280u);
    const uint32_t minus = ptx::AndOr(signs, 0x00100010u, 0x42804280u);
    const __nv_bfloat162 difference = __hsub2(reinterpret_cast<const __nv_bfloat162&>(plus),
                                              reinterpret_cast<const __nv_bfloat162&>(minus));
    return reinterpret_cast<const uint32_t&>(difference);
  }
};

}  // namespace jax_w4moe
