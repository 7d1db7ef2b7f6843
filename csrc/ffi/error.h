// One way to make an FFI error from values, and to leave a handler with it.
#pragma once

#include <cuda_runtime_api.h>

#include <sstream>
#include <string>
#include <utility>

#include "xla/ffi/api/ffi.h"

namespace jax_w4moe {

template <typename... Parts>
std::string StrCat(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return std::move(out).str();
}

template <typename... Parts>
xla::ffi::Error InvalidArgument(const Parts&... parts) {
  return xla::ffi::Error::InvalidArgument(StrCat(parts...));
}

// Success, or an Internal error that names the op, what it was doing and CUDA's reason.
inline xla::ffi::Error FromCuda(cudaError_t status, const char* op, const char* doing) {
  if (status == cudaSuccess) return xla::ffi::Error::Success();
  return xla::ffi::Error::Internal(StrCat(op, ": ", doing, " failed with ",
                                          cudaGetErrorName(status), " (",
                                          cudaGetErrorString(status), ")"));
}

}  // namespace jax_w4moe

#define JAX_W4MOE_RETURN_IF_ERROR(expr)                                     \
  do {                                                                      \
    if (::xla::ffi::Error error_ = (expr); error_.failure()) return error_; \
  } while (false)
