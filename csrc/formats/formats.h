// The weight formats that kernels are compiled for: the class, and the name of its header, which is
// the format's name in Python as well. CMakeLists.txt reads these lines, too.
#pragma once

#include <string_view>

#include "mainloop/activations.cuh"

#define JAX_W4MOE_FORMATS(X) \
  X(Mxfp4, mxfp4)            \
  X(Int4G128, int4_g128)

namespace jax_w4moe {

enum class WeightFormat {
#define JAX_W4MOE_CASE(Format, name) k##Format,
  JAX_W4MOE_FORMATS(JAX_W4MOE_CASE)
#undef JAX_W4MOE_CASE
};

// What the operands of a grouped GEMM are.
struct Operands {
  WeightFormat weights;
  bool is_bf16;  // activations; else E4M3

  int Panels() const { return is_bf16 ? Bf16Activations::kPanels : Fp8Activations::kPanels; }
};

// The format of a name; false if there is none.
inline bool FindFormat(std::string_view name, WeightFormat* format) {
#define JAX_W4MOE_CASE(Format, its_name) \
  if (name == #its_name) {               \
    *format = WeightFormat::k##Format;   \
    return true;                         \
  }
  JAX_W4MOE_FORMATS(JAX_W4MOE_CASE)
#undef JAX_W4MOE_CASE
  return false;
}

}  // namespace jax_w4moe
