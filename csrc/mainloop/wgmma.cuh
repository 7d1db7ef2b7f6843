// One step of a warpgroup: WGMMAs of 32 of K each for each panel of the tokens, A in registers, B
// in shared memory.
#pragma once

#define CUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED  // N that are no power of two
#include <cute/arch/mma_sm90_gmma.hpp>
#include <utility>

#include "formats/record.cuh"
#include "mainloop/activations.cuh"

namespace jax_w4moe {

template <bool kIsE5m2, int N>
struct WgmmaAtom;
#define JAX_W4MOE_WGMMA_ATOM(N)                                         \
  template <>                                                           \
  struct WgmmaAtom<false, N> {                                          \
    using Type = cute::SM90::GMMA::MMA_64x##N##x32_F32E4M3E4M3_RS_TN<>; \
  };                                                                    \
  template <>                                                           \
  struct WgmmaAtom<true, N> {                                           \
    using Type = cute::SM90::GMMA::MMA_64x##N##x32_F32E4M3E5M2_RS_TN<>; \
  };
JAX_W4MOE_WGMMA_ATOM(8)
JAX_W4MOE_WGMMA_ATOM(16)
JAX_W4MOE_WGMMA_ATOM(24)
JAX_W4MOE_WGMMA_ATOM(32)
JAX_W4MOE_WGMMA_ATOM(40)
JAX_W4MOE_WGMMA_ATOM(48)
JAX_W4MOE_WGMMA_ATOM(56)
JAX_W4MOE_WGMMA_ATOM(64)
JAX_W4MOE_WGMMA_ATOM(72)
JAX_W4MOE_WGMMA_ATOM(80)
JAX_W4MOE_WGMMA_ATOM(88)
JAX_W4MOE_WGMMA_ATOM(96)
JAX_W4MOE_WGMMA_ATOM(104)
JAX_W4MOE_WGMMA_ATOM(112)
JAX_W4MOE_WGMMA_ATOM(120)
JAX_W4MOE_WGMMA_ATOM(128)
#undef JAX_W4MOE_WGMMA_ATOM

// Lower half of the descriptor of a token tile: K-major, 128-byte swizzle, atoms of 8 tokens x 128
// bytes (PTX ISA, "Matrix descriptor"). Its address is in units of 16 bytes: 32 of K further on is
// 2, the next token kDescriptorToken. The upper half is always the same, and no sum reaches it.
inline constexpr int kDescriptorToken = 128 / 16;
__device__ __forceinline__ uint32_t TokenDescriptor(uint32_t shared) {
  return (shared & 0x3FFFF) >> 4 | 1 << 16;
}
__device__ __forceinline__ uint64_t WholeDescriptor(uint32_t lower) {
  constexpr uint64_t kStride = 1024 >> 4, kSwizzle128 = 1 << 30;
  return (kStride | kSwizzle128) << 32 | lower;
}

template <bool kIsE5m2, int N, size_t... kI>
__device__ __forceinline__ void Wgmma(float (&d)[N / 2], const uint32_t (&a)[4], uint32_t b,
                                      bool accumulate, std::index_sequence<kI...>) {
  WgmmaAtom<kIsE5m2, N>::Type::fma(
      a[0], a[1], a[2], a[3], WholeDescriptor(b), d[kI]...,
      accumulate ? cute::SM90::GMMA::ScaleOut::One : cute::SM90::GMMA::ScaleOut::Zero);
}

template <typename Activations, int N, int kFirst, int kCount, int kPanel = 0>
__device__ __forceinline__ void MultiplyPanels(float (&partial)[N / 2], const Plane& first,
                                               const Plane& second, uint32_t tokens,
                                               uint32_t panel_stride) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int j = kFirst + i;
    Wgmma<Activations::kIsE5m2[kPanel], N>(partial, (j < 2 ? first : second)[j % 2], tokens + 2 * j,
                                           kPanel + i > 0, std::make_index_sequence<N / 2>{});
  }
  if constexpr (kPanel + 1 < Activations::kPanels) {
    MultiplyPanels<Activations, N, kFirst, kCount, kPanel + 1>(partial, first, second,
                                                               tokens + panel_stride, panel_stride);
  }
}

// Calls f with 0 to kGroups - 1 as constants.
template <int kGroups, int kGroup = 0, typename F>
__device__ __forceinline__ void ForEachGroup(const F& f) {
  f(std::integral_constant<int, kGroup>{});
  if constexpr (kGroup + 1 < kGroups) ForEachGroup<kGroups, kGroup + 1>(f);
}

// Issues the product of a group of a record's K, one of kGroups, with a token tile, given by its
// descriptor; the record is two planes; its panels are `panel_stride` apart in such units.
// `partial` is overwritten, and may be read after WaitForProducts.
template <typename Activations, int N, int kGroups, int kGroup>
__device__ __forceinline__ void IssueGroup(float (&partial)[N / 2], const Plane& first,
                                           const Plane& second, uint32_t tokens,
                                           uint32_t panel_stride) {
  if constexpr (kGroups <= 4) {
    constexpr int kCount = 4 / kGroups;
    MultiplyPanels<Activations, N, kGroup * kCount, kCount>(partial, first, second, tokens,
                                                            panel_stride);
  } else {  // half an instruction, zeros for the other half
    static_assert(kGroups == 8);
    constexpr int kInstruction = kGroup / 2;
    Plane half;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t all = (kInstruction < 2 ? first : second)[kInstruction % 2][i];
      half[kInstruction % 2][i] = i / 2 == kGroup % 2 ? all : 0;
    }
    MultiplyPanels<Activations, N, kInstruction, 1>(partial, half, half, tokens, panel_stride);
  }
}

// The same, between the fences of one group alone.
template <typename Activations, int N, int kGroups, int kGroup>
__device__ __forceinline__ void Multiply(float (&partial)[N / 2], const Plane& first,
                                         const Plane& second, uint32_t tokens,
                                         uint32_t panel_stride) {
  cute::warpgroup_arrive();
  IssueGroup<Activations, N, kGroups, kGroup>(partial, first, second, tokens, panel_stride);
  cute::warpgroup_commit_batch();
}

// Waits for all products but the last kRunning commits; from here on the compiler may read
// `partial`.
template <int kRunning = 0, int N>
__device__ __forceinline__ void WaitForProducts(float (&partial)[N]) {
  cute::warpgroup_wait<kRunning>();
#pragma unroll
  for (int i = 0; i < N; ++i) cute::warpgroup_fence_operand(partial[i]);
}

}  // namespace jax_w4moe
