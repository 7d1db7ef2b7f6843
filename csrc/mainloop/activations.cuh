// What activations are for the main loop: E4M3 with a scale per row, or bf16.
#pragma once

namespace jax_w4moe {

// kPanels: rows of 128 bytes that a token has for 128 of K.
struct Fp8Activations {
  static constexpr int kPanels = 1;
};
struct Bf16Activations {
  static constexpr int kPanels = 2;
};

}  // namespace jax_w4moe
