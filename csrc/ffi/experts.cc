// The checks of experts.h.
#include "ffi/experts.h"

#include "common/limits.h"
#include "ffi/checks.h"
#include "ffi/error.h"
#include "launch/prepare.h"

namespace jax_w4moe {

namespace ffi = xla::ffi;

ffi::Error PrepareLayer(const char* op, const LayerAttributes& a) {
  JAX_W4MOE_RETURN_IF_ERROR(CheckDevice(op));
  Operands operands{};
  JAX_W4MOE_RETURN_IF_ERROR(ReadOperands(op, a.format, a.is_bf16, &operands));
  return FromCuda(PrepareGroupedGemm(operands), op, "raising the shared-memory limit");
}

ffi::Error ReadExperts(const char* op, const LayerAttributes& a, ffi::AnyBuffer w13,
                       ffi::AnyBuffer w13_bias, ffi::AnyBuffer w2, ffi::AnyBuffer w2_bias,
                       int64_t hidden_size, Experts* experts) {
  JAX_W4MOE_RETURN_IF_ERROR(CheckType(op, "w13", w13, ffi::U8, 4));
  JAX_W4MOE_RETURN_IF_ERROR(CheckType(op, "w2", w2, ffi::U8, 4));
  Experts& e = *experts;
  JAX_W4MOE_RETURN_IF_ERROR(ReadOperands(op, a.format, a.is_bf16, &e.operands));
  e.num_experts = w13.dimensions()[0];
  e.hidden_size = hidden_size;
  e.w13_row_blocks = w13.dimensions()[1];
  e.w13_k_blocks = w13.dimensions()[2];
  e.w2_row_blocks = w2.dimensions()[1];
  e.w2_k_blocks = w2.dimensions()[2];
  e.tile_tokens = a.tile_tokens;
  e.activation = {static_cast<ActivationKind>(a.activation),
                  {a.activation_a, a.activation_b, a.activation_c}};
  e.x_rule = {a.x_scale, a.pow2_scales, a.per_128};
  e.h_rule = {a.h_scale, a.pow2_scales, a.per_128};
  if (e.activation.kind != ActivationKind::kSwiGlu && e.activation.kind != ActivationKind::kSiTu) {
    return InvalidArgument(op, ": activation ", a.activation,
                           " has no kernel here; call the op through jax_w4moe, which checks this");
  }
  if (e.num_experts < 1 || e.num_experts > kMaxExperts) {
    return InvalidArgument(op, ": E=", e.num_experts, " is out of range (1 to ", kMaxExperts,
                           "); use fewer experts");
  }
  if (hidden_size < 32 || hidden_size % 32 || hidden_size > e.w2_row_blocks * kRecordRows ||
      (hidden_size + kRecordK - 1) / kRecordK != e.w13_k_blocks) {
    return InvalidArgument(op, ": H=", hidden_size, " does not fit w13's ", e.w13_k_blocks,
                           " K-blocks and w2's ", e.w2_row_blocks,
                           " row blocks; pack the weights of this H");
  }
  if (e.w13_row_blocks != 4 * e.w2_k_blocks) {
    return InvalidArgument(op, ": w13 has ", e.w13_row_blocks, " row blocks, expected ",
                           4 * e.w2_k_blocks, " for w2's K-blocks; pack both with pack_experts");
  }
  JAX_W4MOE_RETURN_IF_ERROR(CheckTile(op, a.tile_tokens, e.operands));
  JAX_W4MOE_RETURN_IF_ERROR(CheckShape(
      op, "w13", w13, {e.num_experts, e.w13_row_blocks, e.w13_k_blocks, e.operands.RecordBytes()}));
  JAX_W4MOE_RETURN_IF_ERROR(CheckShape(
      op, "w2", w2, {e.num_experts, e.w2_row_blocks, e.w2_k_blocks, e.operands.RecordBytes()}));
  e.w13_bias = Optional(w13_bias);
  e.w2_bias = Optional(w2_bias);
  if (e.w13_bias) {
    JAX_W4MOE_RETURN_IF_ERROR(CheckType(op, "w13_bias", w13_bias, ffi::F32, 3));
    JAX_W4MOE_RETURN_IF_ERROR(
        CheckShape(op, "w13_bias", w13_bias, {e.num_experts, e.w13_row_blocks, kRecordRows}));
  }
  if (e.w2_bias) {
    JAX_W4MOE_RETURN_IF_ERROR(CheckType(op, "w2_bias", w2_bias, ffi::F32, 2));
    JAX_W4MOE_RETURN_IF_ERROR(CheckShape(op, "w2_bias", w2_bias, {e.num_experts, hidden_size}));
  }
  e.w13 = w13.untyped_data();
  e.w2 = w2.untyped_data();
  return CheckAligned(op, {e.w13, e.w2});
}

}  // namespace jax_w4moe
