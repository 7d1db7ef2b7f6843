// What the handlers of fused_moe and expert_mlp share: the operands that are experts.
#pragma once

#include <cstdint>
#include <string_view>

#include "launch/experts.h"
#include "xla/ffi/api/ffi.h"

namespace jax_w4moe {

// Checks w13 u8[E, R, C, 4352], w13_bias f32[E, R, 64] or f32[0], w2 u8[E, R, C, 4352] and w2_bias
// f32[E, H] or f32[0] against each other and H, and fills `experts` with all but the activation.
xla::ffi::Error ReadExperts(const char* op, std::string_view format, bool is_bf16,
                            xla::ffi::AnyBuffer w13, xla::ffi::AnyBuffer w13_bias,
                            xla::ffi::AnyBuffer w2, xla::ffi::AnyBuffer w2_bias,
                            int64_t hidden_size, int64_t tile_tokens, Experts* experts);

}  // namespace jax_w4moe
