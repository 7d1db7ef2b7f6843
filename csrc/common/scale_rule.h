// The rule by which bf16 rows get their FP8 scales: jax_w4moe.quantization.PerToken or Static.
#pragma once

namespace jax_w4moe {

struct ScaleRule {
  float fixed;  // of every row; 0: each row its own
  bool pow2;    // the row's own is a power of two
};

}  // namespace jax_w4moe
