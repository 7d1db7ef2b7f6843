// What the handlers of fused_moe and expert_mlp share: the operands that are experts.
#pragma once

#include <cstdint>
#include <string_view>

#include "launch/experts.h"
#include "xla/ffi/api/ffi.h"

namespace jax_w4moe {

// What fused_moe and expert_mlp are told beside their operands, by these names
// (jax_w4moe/ops/experts.py).
struct LayerAttributes {
  std::string_view format;
  bool is_bf16;
  int64_t activation;  // an ActivationKind
  float activation_a, activation_b, activation_c;
  bool pow2_scales, per_128;
  float x_scale, h_scale;  // fixed ones of bf16 rows, or 0
  int64_t tile_tokens;
  int64_t rows_per_expert;  // of expert_mlp's masked layout, else 0
};

// Checks the device, and raises the shared-memory limits of what the attributes name.
xla::ffi::Error PrepareLayer(const char* op, const LayerAttributes& attributes);

// Checks w13 u8[E, R, C, record bytes], w13_bias f32[E, R, 64] or f32[0], w2 u8[E, R, C, record
// bytes] and w2_bias f32[E, H] or f32[0] against each other and H, and fills `experts` with all but
// the activation.
xla::ffi::Error ReadExperts(const char* op, const LayerAttributes& attributes,
                            xla::ffi::AnyBuffer w13, xla::ffi::AnyBuffer w13_bias,
                            xla::ffi::AnyBuffer w2, xla::ffi::AnyBuffer w2_bias,
                            int64_t hidden_size, Experts* experts);

}  // namespace jax_w4moe

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(
    jax_w4moe::LayerAttributes, StructMember<std::string_view>("format"),
    StructMember<bool>("is_bf16"), StructMember<int64_t>("activation"),
    StructMember<float>("activation_a"), StructMember<float>("activation_b"),
    StructMember<float>("activation_c"), StructMember<bool>("pow2_scales"),
    StructMember<bool>("per_128"), StructMember<float>("x_scale"), StructMember<float>("h_scale"),
    StructMember<int64_t>("tile_tokens"), StructMember<int64_t>("rows_per_expert"));
