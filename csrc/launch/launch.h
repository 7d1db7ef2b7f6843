// How the launchers start kernels and divide their workspace.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <utility>

namespace jax_w4moe {

// Starts a kernel. A dependent one may begin while the one before it on the stream ends
// (programmatic dependent launch): it must call ptx::WaitForPrecedingKernels before it touches what
// others write or read. Errors are left to cudaGetLastError.
template <typename... Params, typename... Args>
void Launch(bool is_dependent, void (*kernel)(Params...), dim3 grid, int threads,
            size_t shared_bytes, cudaStream_t stream, Args&&... args) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = is_dependent;
  cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...);
}
template <typename... Params, typename... Args>
void LaunchDependent(void (*kernel)(Params...), dim3 grid, int threads, size_t shared_bytes,
                     cudaStream_t stream, Args&&... args) {
  Launch(true, kernel, grid, threads, shared_bytes, stream, std::forward<Args>(args)...);
}

// Hands out 128-byte aligned parts of a workspace; with a null base it only counts.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<uint8_t*>(base)) {}
  template <typename T>
  T* Take(int64_t count) {
    T* part = reinterpret_cast<T*>(base_ + used_);
    used_ += (count * static_cast<int64_t>(sizeof(T)) + 127) / 128 * 128;
    return part;
  }
  int64_t used() const { return used_; }

 private:
  uint8_t* base_;
  int64_t used_ = 0;
};

inline cudaError_t NumSms(int* num_sms) {
  int device = 0;
  const cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  return cudaDeviceGetAttribute(num_sms, cudaDevAttrMultiProcessorCount, device);
}

}  // namespace jax_w4moe
