// XLA handlers of expert_mlp: x bf16[M, H] and x_scale f32[0], or x f8e4m3fn[M, H] and x_scale
// f32[M, 1]; experts as ffi/experts.h; group_sizes s32[E] -> out bf16[M, H], workspace u8[bytes].
#include "launch/expert_mlp.h"

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

constexpr char kName[] = "expert_mlp";

std::atomic<int64_t> calls{0};

ffi::Error Initialize(std::string_view format, bool is_bf16, float, float, float, int64_t,
                      int64_t) {
  JAX_W4MOE_RETURN_IF_ERROR(CheckDevice(kName));
  Operands operands{};
  JAX_W4MOE_RETURN_IF_ERROR(ReadOperands(kName, format, is_bf16, &operands));
  return FromCuda(PrepareExperts(operands), kName, "raising the shared-memory limit");
}

ffi::Error Execute(cudaStream_t stream, ffi::AnyBuffer x, ffi::AnyBuffer x_scale,
                   ffi::AnyBuffer w13, ffi::AnyBuffer w13_bias, ffi::AnyBuffer w2,
                   ffi::AnyBuffer w2_bias, ffi::AnyBuffer group_sizes,
                   ffi::Result<ffi::AnyBuffer> out, ffi::Result<ffi::AnyBuffer> workspace,
                   std::string_view format, bool is_bf16, float alpha, float beta, float limit,
                   int64_t tile_tokens, int64_t rows_per_expert) {
  calls.fetch_add(1, std::memory_order_relaxed);
  JAX_W4MOE_RETURN_IF_ERROR(CheckRows(kName, "x", x, x_scale, is_bf16));
  JAX_W4MOE_RETURN_IF_ERROR(CheckType(kName, "group_sizes", group_sizes, ffi::S32, 1));
  JAX_W4MOE_RETURN_IF_ERROR(CheckType(kName, "out", *out, ffi::BF16, 2));
  JAX_W4MOE_RETURN_IF_ERROR(CheckType(kName, "workspace", *workspace, ffi::U8, 1));

  ExpertMlpParams p{};
  p.num_rows = x.dimensions()[0];
  p.rows_per_expert = rows_per_expert;
  const int64_t hidden = x.dimensions()[1];
  JAX_W4MOE_RETURN_IF_ERROR(ReadExperts(kName, format, is_bf16, w13, w13_bias, w2, w2_bias, hidden,
                                        tile_tokens, &p.experts));
  p.experts.alpha = alpha;
  p.experts.beta = beta;
  p.experts.limit = limit;
  JAX_W4MOE_RETURN_IF_ERROR(CheckShape(kName, "group_sizes", group_sizes, {p.experts.num_experts}));
  JAX_W4MOE_RETURN_IF_ERROR(CheckShape(kName, "out", *out, {p.num_rows, hidden}));
  if (p.num_rows > kMaxGroupedRows) {
    return InvalidArgument(kName, ": M=", p.num_rows, " is out of range (up to ", kMaxGroupedRows,
                           "); split the call");
  }
  if (rows_per_expert != 0 && rows_per_expert * p.experts.num_experts != p.num_rows) {
    return InvalidArgument(kName, ": ", p.num_rows, " rows are not ", p.experts.num_experts,
                           " experts of ", rows_per_expert, "; call the op through jax_w4moe");
  }
  if (p.num_rows == 0) return ffi::Error::Success();
  JAX_W4MOE_RETURN_IF_ERROR(CheckWorkspace(kName, *workspace, ExpertMlpWorkspaceBytes(p)));
  p.x = x.untyped_data();
  p.x_scale = Optional(x_scale);
  p.group_sizes = static_cast<const int*>(group_sizes.untyped_data());
  p.out = out->untyped_data();
  p.workspace = workspace->untyped_data();
  JAX_W4MOE_RETURN_IF_ERROR(CheckAligned(kName, {p.x, p.out, p.workspace}));
  return FromCuda(LaunchExpertMlp(p, stream), kName, "the kernel launches");
}

XLA_FFI_DEFINE_HANDLER(kInitialize, Initialize,
                       ffi::Ffi::BindInitialize()
                           .Attr<std::string_view>("format")
                           .Attr<bool>("is_bf16")
                           .Attr<float>("alpha")
                           .Attr<float>("beta")
                           .Attr<float>("limit")
                           .Attr<int64_t>("tile_tokens")
                           .Attr<int64_t>("rows_per_expert"));

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
                           .Ret<ffi::AnyBuffer>()
                           .Ret<ffi::AnyBuffer>()
                           .Attr<std::string_view>("format")
                           .Attr<bool>("is_bf16")
                           .Attr<float>("alpha")
                           .Attr<float>("beta")
                           .Attr<float>("limit")
                           .Attr<int64_t>("tile_tokens")
                           .Attr<int64_t>("rows_per_expert"),
                       {ffi::Traits::kCmdBufferCompatible});

}  // namespace

Op ExpertMlpOp() { return {kName, JAX_W4MOE_TARGET("expert_mlp"), kInitialize, kExecute, &calls}; }

}  // namespace jax_w4moe
