// XLA handlers of quantize_fp8: x bf16[T, H] -> x_fp8 f8e4m3fn[T, H], x_scale f32[T, 1].
#include "launch/quantize_fp8.h"

#include "common/version.h"
#include "ffi/checks.h"
#include "ffi/error.h"
#include "ffi/ops.h"

namespace jax_w4moe {
namespace {

namespace ffi = xla::ffi;

constexpr char kName[] = "quantize_fp8";

// Lets a test prove that a CUDA graph is replayed without calling the handler again.
std::atomic<int64_t> calls{0};

ffi::Error Initialize() { return CheckDevice(kName); }

ffi::Error Execute(cudaStream_t stream, ffi::AnyBuffer x, ffi::Result<ffi::AnyBuffer> x_fp8,
                   ffi::Result<ffi::AnyBuffer> x_scale) {
  calls.fetch_add(1, std::memory_order_relaxed);
  JAX_W4MOE_RETURN_IF_ERROR(CheckType(kName, "x", x, ffi::BF16, 2));
  JAX_W4MOE_RETURN_IF_ERROR(CheckType(kName, "x_fp8", *x_fp8, ffi::F8E4M3FN, 2));
  JAX_W4MOE_RETURN_IF_ERROR(CheckType(kName, "x_scale", *x_scale, ffi::F32, 2));
  const int64_t num_tokens = x.dimensions()[0];
  const int64_t hidden_size = x.dimensions()[1];
  JAX_W4MOE_RETURN_IF_ERROR(CheckShape(kName, "x_fp8", *x_fp8, {num_tokens, hidden_size}));
  JAX_W4MOE_RETURN_IF_ERROR(CheckShape(kName, "x_scale", *x_scale, {num_tokens, 1}));
  const QuantizeFp8Params params{x.untyped_data(), x_fp8->untyped_data(),
                                 static_cast<float*>(x_scale->untyped_data()), num_tokens,
                                 hidden_size};
  return FromCuda(LaunchQuantizeFp8(params, stream), kName, "the kernel launch");
}

XLA_FFI_DEFINE_HANDLER(kInitialize, Initialize, ffi::Ffi::BindInitialize());

XLA_FFI_DEFINE_HANDLER(kExecute, Execute,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::PlatformStream<cudaStream_t>>()
                           .Arg<ffi::AnyBuffer>()
                           .Ret<ffi::AnyBuffer>()
                           .Ret<ffi::AnyBuffer>(),
                       {ffi::Traits::kCmdBufferCompatible});

}  // namespace

Op QuantizeFp8Op() {
  return {kName, JAX_W4MOE_TARGET("quantize_fp8"), kInitialize, kExecute, &calls};
}

}  // namespace jax_w4moe
