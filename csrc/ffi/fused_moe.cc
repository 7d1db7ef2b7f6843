// XLA handlers of fused_moe: x f8e4m3fn[T, H], x_scale f32[T, 1], w13 u8[E, R, C, 4352], w13_bias
// f32[E, R, 64] or f32[0], w2 u8[E, R, C, 4352], w2_bias f32[E, H] or f32[0], topk_ids s32[T, k],
// topk_weights f32[T, k] -> y bf16[T, H], workspace u8[bytes].
#include "launch/fused_moe.h"

#include "common/limits.h"
#include "common/version.h"
#include "ffi/checks.h"
#include "ffi/error.h"
#include "ffi/ops.h"
#include "launch/tiles.h"

namespace jax_w4moe {
namespace {

namespace ffi = xla::ffi;

constexpr char kName[] = "fused_moe";

std::atomic<int64_t> calls{0};

ffi::Error Initialize(float, float, float, int64_t) {
  JAX_W4MOE_RETURN_IF_ERROR(CheckDevice(kName));
  return FromCuda(PrepareFusedMoe(), kName, "raising the shared-memory limit");
}

// A bias of no elements means none.
const float* Bias(ffi::AnyBuffer bias) {
  return bias.element_count() ? static_cast<const float*>(bias.untyped_data()) : nullptr;
}

ffi::Error CheckSizes(const FusedMoeParams& p) {
  if (p.num_experts < 1 || p.num_experts > kMaxExperts || p.top_k < 1 || p.top_k > 32) {
    return InvalidArgument(kName, ": E=", p.num_experts, " (1 to 1024) or k=", p.top_k,
                           " (1 to 32) is out of range; use fewer");
  }
  if (p.hidden_size < 32 || p.hidden_size % 32 || p.hidden_size > p.w2_row_blocks * 64 ||
      (p.hidden_size + 127) / 128 != p.w13_k_blocks) {
    return InvalidArgument(kName, ": H=", p.hidden_size, " does not fit w13's ", p.w13_k_blocks,
                           " K-blocks and w2's ", p.w2_row_blocks,
                           " row blocks; pack the weights of this H");
  }
  if (p.w13_row_blocks != 4 * p.w2_k_blocks) {
    return InvalidArgument(kName, ": w13 has ", p.w13_row_blocks, " row blocks, expected ",
                           4 * p.w2_k_blocks, " for w2's K-blocks; pack both with pack_experts");
  }
  if (!HasTile(p.tile_tokens)) {
    return InvalidArgument(kName, ": no tile of ", p.tile_tokens,
                           " tokens is compiled; call the op through jax_w4moe, which knows them");
  }
  return ffi::Error::Success();
}

ffi::Error Execute(cudaStream_t stream, ffi::AnyBuffer x, ffi::AnyBuffer x_scale,
                   ffi::AnyBuffer w13, ffi::AnyBuffer w13_bias, ffi::AnyBuffer w2,
                   ffi::AnyBuffer w2_bias, ffi::AnyBuffer topk_ids, ffi::AnyBuffer topk_weights,
                   ffi::Result<ffi::AnyBuffer> y, ffi::Result<ffi::AnyBuffer> workspace,
                   float alpha, float beta, float limit, int64_t tile_tokens) {
  calls.fetch_add(1, std::memory_order_relaxed);
  JAX_W4MOE_RETURN_IF_ERROR(CheckType(kName, "x", x, ffi::F8E4M3FN, 2));
  JAX_W4MOE_RETURN_IF_ERROR(CheckType(kName, "x_scale", x_scale, ffi::F32, 2));
  JAX_W4MOE_RETURN_IF_ERROR(CheckType(kName, "w13", w13, ffi::U8, 4));
  JAX_W4MOE_RETURN_IF_ERROR(CheckType(kName, "w2", w2, ffi::U8, 4));
  JAX_W4MOE_RETURN_IF_ERROR(CheckType(kName, "topk_ids", topk_ids, ffi::S32, 2));
  JAX_W4MOE_RETURN_IF_ERROR(CheckType(kName, "topk_weights", topk_weights, ffi::F32, 2));
  JAX_W4MOE_RETURN_IF_ERROR(CheckType(kName, "y", *y, ffi::BF16, 2));
  JAX_W4MOE_RETURN_IF_ERROR(CheckType(kName, "workspace", *workspace, ffi::U8, 1));

  FusedMoeParams p{};
  p.num_tokens = x.dimensions()[0];
  p.hidden_size = x.dimensions()[1];
  p.num_experts = w13.dimensions()[0];
  p.top_k = topk_ids.dimensions()[1];
  p.w13_row_blocks = w13.dimensions()[1];
  p.w13_k_blocks = w13.dimensions()[2];
  p.w2_row_blocks = w2.dimensions()[1];
  p.w2_k_blocks = w2.dimensions()[2];
  p.tile_tokens = tile_tokens;
  p.alpha = alpha;
  p.beta = beta;
  p.limit = limit;
  JAX_W4MOE_RETURN_IF_ERROR(CheckSizes(p));
  const int64_t tokens = p.num_tokens, experts = p.num_experts;
  JAX_W4MOE_RETURN_IF_ERROR(CheckShape(kName, "x_scale", x_scale, {tokens, 1}));
  JAX_W4MOE_RETURN_IF_ERROR(
      CheckShape(kName, "w13", w13, {experts, p.w13_row_blocks, p.w13_k_blocks, kRecordBytes}));
  JAX_W4MOE_RETURN_IF_ERROR(
      CheckShape(kName, "w2", w2, {experts, p.w2_row_blocks, p.w2_k_blocks, kRecordBytes}));
  JAX_W4MOE_RETURN_IF_ERROR(CheckShape(kName, "topk_ids", topk_ids, {tokens, p.top_k}));
  JAX_W4MOE_RETURN_IF_ERROR(CheckShape(kName, "topk_weights", topk_weights, {tokens, p.top_k}));
  JAX_W4MOE_RETURN_IF_ERROR(CheckShape(kName, "y", *y, {tokens, p.hidden_size}));
  if (Bias(w13_bias)) {
    JAX_W4MOE_RETURN_IF_ERROR(CheckType(kName, "w13_bias", w13_bias, ffi::F32, 3));
    JAX_W4MOE_RETURN_IF_ERROR(
        CheckShape(kName, "w13_bias", w13_bias, {experts, p.w13_row_blocks, 64}));
  }
  if (Bias(w2_bias)) {
    JAX_W4MOE_RETURN_IF_ERROR(CheckType(kName, "w2_bias", w2_bias, ffi::F32, 2));
    JAX_W4MOE_RETURN_IF_ERROR(CheckShape(kName, "w2_bias", w2_bias, {experts, p.hidden_size}));
  }
  const int64_t needed = tokens ? FusedMoeWorkspaceBytes(p) : 0;
  JAX_W4MOE_RETURN_IF_ERROR(CheckWorkspace(kName, *workspace, needed));
  p.x = x.untyped_data();
  p.x_scale = static_cast<const float*>(x_scale.untyped_data());
  p.w13 = w13.untyped_data();
  p.w2 = w2.untyped_data();
  p.w13_bias = Bias(w13_bias);
  p.w2_bias = Bias(w2_bias);
  p.topk_ids = static_cast<const int*>(topk_ids.untyped_data());
  p.topk_weights = static_cast<const float*>(topk_weights.untyped_data());
  p.y = y->untyped_data();
  p.workspace = workspace->untyped_data();
  JAX_W4MOE_RETURN_IF_ERROR(CheckAligned(kName, {p.x, p.w13, p.w2, p.workspace}));
  return FromCuda(LaunchFusedMoe(p, stream), kName, "the kernel launches");
}

XLA_FFI_DEFINE_HANDLER(kInitialize, Initialize,
                       ffi::Ffi::BindInitialize()
                           .Attr<float>("alpha")
                           .Attr<float>("beta")
                           .Attr<float>("limit")
                           .Attr<int64_t>("tile_tokens"));

XLA_FFI_DEFINE_HANDLER(kExecute, Execute,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::PlatformStream<cudaStream_t>>()
                           .Arg<ffi::AnyBuffer>()
                           .Arg<ffi::AnyBuffer>()
                           .Arg<ffi::AnyBuffer>()
                           .Arg<ffi::AnyBuffer>()
                           .Arg<ffi::AnyBuffer>()
                           .Arg<ffi::AnyBuffer>()
                           .Arg<ffi::AnyBuffer>()
                           .Arg<ffi::AnyBuffer>()
                           .Ret<ffi::AnyBuffer>()
                           .Ret<ffi::AnyBuffer>()
                           .Attr<float>("alpha")
                           .Attr<float>("beta")
                           .Attr<float>("limit")
                           .Attr<int64_t>("tile_tokens"),
                       {ffi::Traits::kCmdBufferCompatible});

}  // namespace

Op FusedMoeOp() { return {kName, JAX_W4MOE_TARGET("fused_moe"), kInitialize, kExecute, &calls}; }

}  // namespace jax_w4moe
