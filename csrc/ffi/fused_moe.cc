// XLA handlers of fused_moe: x bf16[T, H] and x_scale f32[0], or x f8e4m3fn[T, H] and x_scale
// f32[T, 1]; experts as ffi/experts.h; topk_ids s32[T, k], topk_weights f32[T, k]
// -> y bf16[T, H], workspace u8[bytes].
#include "launch/fused_moe.h"

#include "common/limits.h"
#include "common/version.h"
#include "ffi/checks.h"
#include "ffi/error.h"
#include "ffi/experts.h"
#include "ffi/ops.h"

namespace jax_w4moe {
namespace {

namespace ffi = xla::ffi;

constexpr char kName[] = "fused_moe";

std::atomic<int64_t> calls{0};

ffi::Error Initialize(const LayerAttributes& attributes) { return PrepareLayer(kName, attributes); }

ffi::Error Execute(cudaStream_t stream, ffi::AnyBuffer x, ffi::AnyBuffer x_scale,
                   ffi::AnyBuffer w13, ffi::AnyBuffer w13_bias, ffi::AnyBuffer w2,
                   ffi::AnyBuffer w2_bias, ffi::AnyBuffer topk_ids, ffi::AnyBuffer topk_weights,
                   ffi::Result<ffi::AnyBuffer> y, ffi::Result<ffi::AnyBuffer> workspace,
                   const LayerAttributes& attributes) {
  calls.fetch_add(1, std::memory_order_relaxed);
  JAX_W4MOE_RETURN_IF_ERROR(CheckRows(kName, "x", x, x_scale, attributes.is_bf16));
  JAX_W4MOE_RETURN_IF_ERROR(CheckType(kName, "topk_ids", topk_ids, ffi::S32, 2));
  JAX_W4MOE_RETURN_IF_ERROR(CheckType(kName, "topk_weights", topk_weights, ffi::F32, 2));
  JAX_W4MOE_RETURN_IF_ERROR(CheckType(kName, "y", *y, ffi::BF16, 2));
  JAX_W4MOE_RETURN_IF_ERROR(CheckType(kName, "workspace", *workspace, ffi::U8, 1));

  FusedMoeParams p{};
  p.num_tokens = x.dimensions()[0];
  p.top_k = topk_ids.dimensions()[1];
  const int64_t hidden = x.dimensions()[1];
  if (p.top_k < 1 || p.top_k > kMaxTopK) {
    return InvalidArgument(kName, ": k=", p.top_k, " is out of range (1 to ", kMaxTopK,
                           "); use fewer");
  }
  JAX_W4MOE_RETURN_IF_ERROR(
      ReadExperts(kName, attributes, w13, w13_bias, w2, w2_bias, hidden, &p.experts));
  JAX_W4MOE_RETURN_IF_ERROR(CheckShape(kName, "topk_ids", topk_ids, {p.num_tokens, p.top_k}));
  JAX_W4MOE_RETURN_IF_ERROR(
      CheckShape(kName, "topk_weights", topk_weights, {p.num_tokens, p.top_k}));
  JAX_W4MOE_RETURN_IF_ERROR(CheckShape(kName, "y", *y, {p.num_tokens, hidden}));
  if (p.num_tokens == 0) return ffi::Error::Success();
  JAX_W4MOE_RETURN_IF_ERROR(CheckWorkspace(kName, *workspace, FusedMoeWorkspaceBytes(p)));
  p.x = x.untyped_data();
  p.x_scale = Optional(x_scale);
  p.topk_ids = static_cast<const int*>(topk_ids.untyped_data());
  p.topk_weights = static_cast<const float*>(topk_weights.untyped_data());
  p.y = y->untyped_data();
  p.workspace = workspace->untyped_data();
  JAX_W4MOE_RETURN_IF_ERROR(CheckAligned(kName, {p.x, p.y, p.workspace}));
  return FromCuda(LaunchFusedMoe(p, stream), kName, "the kernel launches");
}

XLA_FFI_DEFINE_HANDLER(kInitialize, Initialize,
                       ffi::Ffi::BindInitialize().Attrs<LayerAttributes>());

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
                           .Attrs<LayerAttributes>(),
                       {ffi::Traits::kCmdBufferCompatible});

}  // namespace

Op FusedMoeOp() { return {kName, JAX_W4MOE_TARGET("fused_moe"), kInitialize, kExecute, &calls}; }

}  // namespace jax_w4moe
