// The weight formats that kernels are compiled for: the class; the name of its header, which is the
// format's name in Python as well; the 32-bit scale words of a row and 128 of K; the order of K;
// and the groups of 128 of K that have a sum each, since a scale each: 1, 4 of an instruction, 8 of
// half a one (jax_w4moe/ops/tiles.py has the same). CMakeLists.txt reads these lines, too.
#pragma once

#include <string_view>
#include <type_traits>

#include "common/limits.h"
#include "mainloop/activations.cuh"

#define JAX_W4MOE_FORMATS(X)                       \
  X(Mxfp4, mxfp4, 1, KOrder::kByLane, 1)           \
  X(Int4G128, int4_g128, 1, KOrder::kByLane, 1)    \
  X(Int4G32, int4_g32, 2, KOrder::kInOrder, 4)     \
  X(Mxfp4Wide, mxfp4_wide, 1, KOrder::kInOrder, 4) \
  X(Nvfp4, nvfp4, 3, KOrder::kInOrder, 8)

namespace jax_w4moe {

// Which k a byte of a fragment is, of instruction j, half h, lane of the quad t, byte b
// (docs/layout.md).
enum class KOrder {
  kByLane,   // 32 t + 8 j + 4 h + b: a lane's codes are of one group of 32
  kInOrder,  // 32 j + 16 h + 4 t + b: an instruction's codes are of one group of 32
};

enum class WeightFormat {
#define JAX_W4MOE_CASE(Format, ...) k##Format,
  JAX_W4MOE_FORMATS(JAX_W4MOE_CASE)
#undef JAX_W4MOE_CASE
};

template <typename Format>
struct FormatTraits;
#define JAX_W4MOE_CASE(Format, name, scale_words, k_order, groups)                  \
  struct Format;                                                                    \
  template <>                                                                       \
  struct FormatTraits<Format> {                                                     \
    static constexpr int kScaleWords = scale_words;                                 \
    static constexpr int kRecordBytes = kCodeBytes + kRecordRows * 4 * kScaleWords; \
    static constexpr KOrder kKOrder = k_order;                                      \
    static constexpr int kGroups = groups;                                          \
  };
JAX_W4MOE_FORMATS(JAX_W4MOE_CASE)
#undef JAX_W4MOE_CASE

// Calls f with a pointer to the format's class.
template <typename F>
constexpr auto WithFormat(WeightFormat format, const F& f) {
  switch (format) {
#define JAX_W4MOE_CASE(Format, ...) \
  case WeightFormat::k##Format:     \
    return f(static_cast<Format*>(nullptr));
    JAX_W4MOE_FORMATS(JAX_W4MOE_CASE)
#undef JAX_W4MOE_CASE
  }
  return f(static_cast<Mxfp4*>(nullptr));  // no other value
}

// What the operands of a grouped GEMM are.
struct Operands {
  WeightFormat weights;
  bool is_bf16;  // activations; else E4M3

  int Panels() const { return is_bf16 ? Bf16Activations::kPanels : Fp8Activations::kPanels; }
  int RecordBytes() const {
    return WithFormat(weights, [](auto* format) { return Traits<decltype(format)>::kRecordBytes; });
  }
  int Groups() const {
    return WithFormat(weights, [](auto* format) { return Traits<decltype(format)>::kGroups; });
  }
  jax_w4moe::KOrder KOrder() const {
    return WithFormat(weights, [](auto* format) { return Traits<decltype(format)>::kKOrder; });
  }

 private:
  template <typename Pointer>
  using Traits = FormatTraits<std::remove_pointer_t<Pointer>>;
};

// The format of a name; false if there is none.
inline bool FindFormat(std::string_view name, WeightFormat* format) {
#define JAX_W4MOE_CASE(Format, its_name, ...) \
  if (name == #its_name) {                    \
    *format = WeightFormat::k##Format;        \
    return true;                              \
  }
  JAX_W4MOE_FORMATS(JAX_W4MOE_CASE)
#undef JAX_W4MOE_CASE
  return false;
}

}  // namespace jax_w4moe
