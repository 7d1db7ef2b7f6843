// The rule by which bf16 rows get their FP8 scales: jax_w4moe.quantization.PerToken, Static or
// Per128.
#pragma once

namespace jax_w4moe {

struct ScaleRule {
  float fixed;   // of every row; 0: each row its own
  bool pow2;     // the row's own is a power of two
  bool per_128;  // of rows that stay bf16: they are rounded to E4M3 under a scale per 128 values
};

}  // namespace jax_w4moe
