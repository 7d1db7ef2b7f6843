// XLA handlers of grouped_matmul: lhs bf16[M, K] and x_scale f32[0], or lhs f8e4m3fn[M, K] and
// x_scale f32[M, 1]; records u8[E, R, C, record bytes], group_sizes s32[E]
// -> out bf16|f32[M, N], workspace u8[bytes].
#include "launch/grouped_matmul.h"

#include <string_view>

#include "common/limits.h"
#include "common/version.h"
#include "ffi/checks.h"
#include "ffi/error.h"
#include "ffi/ops.h"
#include "launch/prepare.h"

namespace jax_w4moe {
namespace {

namespace ffi = xla::ffi;

constexpr char kName[] = "grouped_matmul";

std::atomic<int64_t> calls{0};

ffi::Error Initialize(std::string_view format, bool is_bf16, bool, bool, float, bool, int64_t) {
  JAX_W4MOE_RETURN_IF_ERROR(CheckDevice(kName));
  Operands operands{};
  JAX_W4MOE_RETURN_IF_ERROR(ReadOperands(kName, format, is_bf16, &operands));
  return FromCuda(PrepareGroupedGemm(operands), kName, "raising the shared-memory limit");
}

ffi::Error Execute(cudaStream_t stream, ffi::AnyBuffer lhs, ffi::AnyBuffer x_scale,
                   ffi::AnyBuffer records, ffi::AnyBuffer group_sizes,
                   ffi::Result<ffi::AnyBuffer> out, ffi::Result<ffi::AnyBuffer> workspace,
                   std::string_view format, bool is_bf16, bool pow2_scales, bool per_128,
                   float fixed_scale, bool gate_up, int64_t tile_tokens) {
  calls.fetch_add(1, std::memory_order_relaxed);
  JAX_W4MOE_RETURN_IF_ERROR(CheckRows(kName, "lhs", lhs, x_scale, is_bf16));
  JAX_W4MOE_RETURN_IF_ERROR(CheckType(kName, "records", records, ffi::U8, 4));
  JAX_W4MOE_RETURN_IF_ERROR(CheckType(kName, "group_sizes", group_sizes, ffi::S32, 1));
  const bool out_is_f32 = out->element_type() == ffi::F32;
  JAX_W4MOE_RETURN_IF_ERROR(CheckType(kName, "out", *out, out_is_f32 ? ffi::F32 : ffi::BF16, 2));
  JAX_W4MOE_RETURN_IF_ERROR(CheckType(kName, "workspace", *workspace, ffi::U8, 1));

  GroupedMatmulParams p{};
  JAX_W4MOE_RETURN_IF_ERROR(ReadOperands(kName, format, is_bf16, &p.operands));
  p.num_rows = lhs.dimensions()[0];
  p.contraction = lhs.dimensions()[1];
  p.num_experts = records.dimensions()[0];
  p.row_blocks = records.dimensions()[1];
  p.k_blocks = records.dimensions()[2];
  p.num_columns = out->dimensions()[1];
  p.tile_tokens = tile_tokens;
  p.gate_up = gate_up;
  p.x_rule = {fixed_scale, pow2_scales, per_128};
  p.out_is_f32 = out_is_f32;
  JAX_W4MOE_RETURN_IF_ERROR(
      CheckShape(kName, "records", records,
                 {p.num_experts, p.row_blocks, p.k_blocks, p.operands.RecordBytes()}));
  JAX_W4MOE_RETURN_IF_ERROR(CheckShape(kName, "group_sizes", group_sizes, {p.num_experts}));
  JAX_W4MOE_RETURN_IF_ERROR(CheckShape(kName, "out", *out, {p.num_rows, p.num_columns}));
  if (p.num_experts < 1 || p.num_experts > kMaxExperts || p.num_rows > kMaxGroupedRows) {
    return InvalidArgument(kName, ": E=", p.num_experts, " (1 to 1024) or M=", p.num_rows,
                           " (up to 2^24) is out of range; split the call");
  }
  if (p.contraction % 32 || (p.contraction + 127) / 128 != p.k_blocks) {
    return InvalidArgument(kName, ": K=", p.contraction, " does not fit ", p.k_blocks,
                           " K-blocks of 128; pack the weights of this K");
  }
  const int64_t rows = p.row_blocks * 64;
  if (p.num_columns < 1 || p.num_columns > rows || p.num_columns % 32) {
    return InvalidArgument(kName, ": N=", p.num_columns, " does not fit ", p.row_blocks,
                           " row blocks of 64; pack the weights of this N");
  }
  JAX_W4MOE_RETURN_IF_ERROR(CheckTile(kName, tile_tokens, p.operands));
  const int64_t needed =
      GroupedMatmulWorkspaceBytes(p.num_rows, p.k_blocks * p.operands.Panels(), p.num_experts);
  JAX_W4MOE_RETURN_IF_ERROR(CheckWorkspace(kName, *workspace, needed));
  p.lhs = lhs.untyped_data();
  p.x_scale = Optional(x_scale);
  p.records = records.untyped_data();
  p.group_sizes = static_cast<const int*>(group_sizes.untyped_data());
  p.out = out->untyped_data();
  p.workspace = workspace->untyped_data();
  JAX_W4MOE_RETURN_IF_ERROR(CheckAligned(kName, {p.lhs, p.records, p.out, p.workspace}));
  return FromCuda(LaunchGroupedMatmul(p, stream), kName, "the kernel launches");
}

XLA_FFI_DEFINE_HANDLER(kInitialize, Initialize,
                       ffi::Ffi::BindInitialize()
                           .Attr<std::string_view>("format")
                           .Attr<bool>("is_bf16")
                           .Attr<bool>("pow2_scales")
                           .Attr<bool>("per_128")
                           .Attr<float>("x_scale")
                           .Attr<bool>("gate_up")
                           .Attr<int64_t>("tile_tokens"));

XLA_FFI_DEFINE_HANDLER(kExecute, Execute,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::PlatformStream<cudaStream_t>>()
                           .Arg<ffi::AnyBuffer>()
                           .Arg<ffi::AnyBuffer>()
                           .Arg<ffi::AnyBuffer>()
                           .Arg<ffi::AnyBuffer>()
                           .Ret<ffi::AnyBuffer>()
                           .Ret<ffi::AnyBuffer>()
                           .Attr<std::string_view>("format")
                           .Attr<bool>("is_bf16")
                           .Attr<bool>("pow2_scales")
                           .Attr<bool>("per_128")
                           .Attr<float>("x_scale")
                           .Attr<bool>("gate_up")
                           .Attr<int64_t>("tile_tokens"),
                       {ffi::Traits::kCmdBufferCompatible});

}  // namespace

Op GroupedMatmulOp() {
  return {kName, JAX_W4MOE_TARGET("grouped_matmul"), kInitialize, kExecute, &calls};
}

}  // namespace jax_w4moe
