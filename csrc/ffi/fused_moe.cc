// XLA handlers of fused_moe: x bf16[T, H] and x_scale f32[0], or x f8e4m3fn[T, H] and x_scale
// f32[T, 1]; experts as ffi/experts.h; topk_ids s32[T, k], topk_weights f32[T, k]
// -> y bf16[T, H], workspace u8[bytes].
#include "launch/fused_moe.h"

#include <string_view>

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

ffi::Error Initialize(std::string_view format, bool is_bf16, float, float, float, int64_t) {
  JAX_W4MOE_RETURN_IF_ERROR(CheckDevice(kName));
  Operands operands{};
  JAX_W4MOE_RETURN_IF_ERROR(ReadOperands(kName, format, is_bf16, &operands));
  return FromCuda(PrepareExperts(operands), kName, "raising the shared-memory limit");
}

ffi::Error Execute(cudaStream_t stream, ffi::AnyBuffer x, ffi::AnyBuffer x_scale,
                   ffi::AnyBuffer w13, ffi::AnyBuffer w13_bias, ffi::AnyBuffer w2,
                   ffi::AnyBuffer w2_bias, ffi::AnyBuffer topk_ids, ffi::AnyBuffer topk_weights,
                   ffi::Result<ffi::AnyBuffer> y, ffi::Result<ffi::AnyBuffer> workspace,
                   std::string_view format, bool is_bf16, float alpha, float beta, float limit,
                   int64_t tile_tokens) {
  calls.fetch_add(1, std::memory_order_relaxed);
  JAX_W4MOE_RETURN_IF_ERROR(CheckRows(kName, "x", x, x_scale, is_bf16));
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
  JAX_W4MOE_RETURN_IF_ERROR(ReadExperts(kName, format, is_bf16, w13, w13_bias, w2, w2_bias, hidden,
                                        tile_tokens, &p.experts));
  p.experts.alpha = alpha;
  p.experts.beta = beta;
  p.experts.limit = limit;
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
                       ffi::Ffi::BindInitialize()
                           .Attr<std::string_view>("format")
                           .Attr<bool>("is_bf16")
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
                           .Attr<std::string_view>("format")
                           .Attr<bool>("is_bf16")
                           .Attr<float>("alpha")
                           .Attr<float>("beta")
                           .Attr<float>("limit")
                           .Attr<int64_t>("tile_tokens"),
                       {ffi::Traits::kCmdBufferCompatible});

}  // namespace

Op FusedMoeOp() { return {kName, JAX_W4MOE_TARGET("fused_moe"), kInitialize, kExecute, &calls}; }

}  // namespace jax_w4moe
