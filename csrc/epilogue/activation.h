// The gated activations: jax_w4moe.activations.
#pragma once

#include <cstdint>

namespace jax_w4moe {

enum class ActivationKind : int64_t { kSwiGlu, kSiTu };

struct Activation {
  ActivationKind kind;
  // Of SwiGLU alpha, beta and limit (infinite for no clamp); of SiTU gate_bound, up_bound and none.
  float parameters[3];
};

}  // namespace jax_w4moe
