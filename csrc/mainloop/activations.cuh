// What activations are for the main loop: E4M3, or bf16 as two FP8 numbers each.
#pragma once

namespace jax_w4moe {

// Panels are rows of 128 bytes that a token has for 128 of K, each multiplied with the same
// fragments of weights into the same sums; kIsE5m2 says what a panel's bytes are.
struct Fp8Activations {
  static constexpr int kPanels = 1;
  static constexpr bool kIsE5m2[kPanels] = {false};
};

// x = low + high: high is x rounded to E5M2, low what that leaves, in E4M3
// (kernels/token_image.cuh).
struct Bf16Activations {
  static constexpr int kPanels = 2;
  static constexpr bool kIsE5m2[kPanels] = {false, true};
};

}  // namespace jax_w4moe
