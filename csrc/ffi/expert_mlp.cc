// XLA handlers of expert_mlp: x bf16[M, H] and x_scale f32[0], or x f8e4m3fn[M, H] and x_scale
// f32[M, 1]; experts as ffi/experts.h; group_sizes s32[E] -> out bf16[M, H], workspace u8[bytes].
#include "launch/expert_mlp.h"

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

ffi::Error Initialize(const LayerAttributes& attributes) { return PrepareLayer(kName, attributes); }

ffi::Error Execute(cudaStream_t stream, ffi::AnyBuffer x, ffi::AnyBuffer x_scale,
                   ffi::AnyBuffer w13, ffi::AnyBuffer w13_bias, ffi::AnyBuffer w2,
                   ffi::AnyBuffer w2_bias, ffi::AnyBuffer group_sizes,
                   ffi::Result<ffi::AnyBuffer> out, ffi::Result<ffi::AnyBuffer> workspace,
                   const LayerAttributes& attributes) {
  calls.fetch_add(1, std::memory_order_relaxed);
  JAX_W4MOE_RETURN_IF_ERROR(CheckRows(kName, "x", x, x_scale, attributes.is_bf16));
  JAX_W4MOE_RETURN_IF_ERROR(CheckType(kName, "group_sizes", group_sizes, ffi::S32, 1));
  JAX_W4MOE_RETURN_IF_ERROR(CheckType(kName, "out", *out, ffi::BF16, 2));
  JAX_W4MOE_RETURN_IF_ERROR(CheckType(kName, "workspace", *workspace, ffi::U8, 1));

  ExpertMlpParams p{};
  p.num_rows = x.dimensions()[0];
  p.rows_per_expert = attributes.rows_per_expert;
  const int64_t hidden = x.dimensions()[1];
  JAX_W4MOE_RETURN_IF_ERROR(
      ReadExperts(kName, attributes, w13, w13_bias, w2, w2_bias, hidden, &p.experts));
  JAX_W4MOE_RETURN_IF_ERROR(CheckShape(kName, "group_sizes", group_sizes, {p.experts.num_experts}));
  JAX_W4MOE_RETURN_IF_ERROR(CheckShape(kName, "out", *out, {p.num_rows, hidden}));
  if (p.num_rows > kMaxGroupedRows) {
    return InvalidArgument(kName, ": M=", p.num_rows, " is out of range (up to ", kMaxGroupedRows,
                           "); split the call");
  }
  if (attributes.rows_per_expert != 0 &&
      attributes.rows_per_expert * p.experts.num_experts != p.num_rows) {
    return InvalidArgument(kName, ": ", p.num_rows, " rows are not ", p.experts.num_experts,
                           " experts of ", attributes.rows_per_expert,
                           "; call the op through jax_w4moe");
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
                           .Ret<ffi::AnyBuffer>()
                           .Ret<ffi::AnyBuffer>()
                           .Attrs<LayerAttributes>(),
                       {ffi::Traits::kCmdBufferCompatible});

}  // namespace

Op ExpertMlpOp() { return {kName, JAX_W4MOE_TARGET("expert_mlp"), kInitialize, kExecute, &calls}; }

}  // namespace jax_w4moe
