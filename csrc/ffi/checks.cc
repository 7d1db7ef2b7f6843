// The sentences of the checks that all handlers share.
#include "ffi/checks.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <string>

#include "ffi/error.h"
#include "launch/grouped_gemm_tiles.h"

namespace jax_w4moe {
namespace {

namespace ffi = xla::ffi;

template <typename Range>
std::string Shape(const Range& dims) {
  std::string text = "[";
  for (int64_t dim : dims) text += (text.size() > 1 ? ", " : "") + std::to_string(dim);
  return text + "]";
}

XLA_FFI_DataType Printable(ffi::DataType dtype) { return static_cast<XLA_FFI_DataType>(dtype); }

}  // namespace

ffi::Error CheckDevice(const char* op) {
  int device = 0;
  int major = 0;
  int minor = 0;
  JAX_W4MOE_RETURN_IF_ERROR(FromCuda(cudaGetDevice(&device), op, "cudaGetDevice"));
  JAX_W4MOE_RETURN_IF_ERROR(
      FromCuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), op,
               "reading the compute capability"));
  JAX_W4MOE_RETURN_IF_ERROR(
      FromCuda(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), op,
               "reading the compute capability"));
  if (major != 9 || minor != 0) {
    return InvalidArgument(op, ": CUDA device ", device, " has compute capability ", major, ".",
                           minor, ", the kernels need 9.0 (Hopper); use implementation=\"xla\"");
  }
  return ffi::Error::Success();
}

ffi::Error CheckType(const char* op, const char* name, ffi::AnyBuffer buffer, ffi::DataType dtype,
                     size_t rank) {
  if (buffer.element_type() != dtype) {
    return InvalidArgument(op, ": ", name, " has dtype ", Printable(buffer.element_type()),
                           ", expected ", Printable(dtype),
                           "; call the op through jax_w4moe, which checks this");
  }
  if (buffer.dimensions().size() != rank) {
    return InvalidArgument(op, ": ", name, " has rank ", buffer.dimensions().size(), " (shape ",
                           Shape(buffer.dimensions()), "), expected rank ", rank,
                           "; call the op through jax_w4moe, which checks this");
  }
  return ffi::Error::Success();
}

ffi::Error CheckShape(const char* op, const char* name, ffi::AnyBuffer buffer,
                      std::initializer_list<int64_t> expected) {
  auto dims = buffer.dimensions();
  if (!std::equal(dims.begin(), dims.end(), expected.begin(), expected.end())) {
    return InvalidArgument(op, ": ", name, " has shape ", Shape(dims), ", expected ",
                           Shape(expected), "; call the op through jax_w4moe, which checks this");
  }
  return ffi::Error::Success();
}

ffi::Error CheckRows(const char* op, const char* name, ffi::AnyBuffer rows, ffi::AnyBuffer x_scale,
                     bool is_bf16) {
  const bool is_fp8 = !is_bf16 && rows.element_type() == ffi::F8E4M3FN;
  JAX_W4MOE_RETURN_IF_ERROR(CheckType(op, name, rows, is_fp8 ? ffi::F8E4M3FN : ffi::BF16, 2));
  JAX_W4MOE_RETURN_IF_ERROR(CheckType(op, "x_scale", x_scale, ffi::F32, is_fp8 ? 2 : 1));
  return is_fp8 ? CheckShape(op, "x_scale", x_scale, {rows.dimensions()[0], 1})
                : CheckShape(op, "x_scale", x_scale, {0});
}

const float* Optional(ffi::AnyBuffer buffer) {
  return buffer.element_count() ? static_cast<const float*>(buffer.untyped_data()) : nullptr;
}

ffi::Error ReadOperands(const char* op, std::string_view format, bool is_bf16, Operands* operands) {
  operands->is_bf16 = is_bf16;
  if (!FindFormat(format, &operands->weights)) {
    return InvalidArgument(
        op, ": weights of format \"", format,
        "\" have no kernel here; call the op through jax_w4moe, which checks this");
  }
  return ffi::Error::Success();
}

ffi::Error CheckTile(const char* op, int64_t tile_tokens, Operands operands) {
  if (!HasTile(tile_tokens, operands)) {
    return InvalidArgument(
        op, ": no tile of ", tile_tokens,
        " tokens is compiled for these operands; call the op through jax_w4moe, which knows them");
  }
  return ffi::Error::Success();
}

ffi::Error CheckWorkspace(const char* op, ffi::AnyBuffer workspace, int64_t needed) {
  if (workspace.dimensions()[0] < needed) {
    return InvalidArgument(op, ": workspace has ", workspace.dimensions()[0], " bytes, needs ",
                           needed, "; call the op through jax_w4moe, which sizes it");
  }
  return ffi::Error::Success();
}

ffi::Error CheckAligned(const char* op, std::initializer_list<const void*> pointers) {
  for (const void* pointer : pointers) {
    if (reinterpret_cast<uintptr_t>(pointer) % 128) {
      return InvalidArgument(op, ": an operand at ", pointer,
                             " is not aligned to 128 bytes; pass whole arrays");
    }
  }
  return ffi::Error::Success();
}

}  // namespace jax_w4moe
