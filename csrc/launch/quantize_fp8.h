// Launcher of quantize_fp8: raw device pointers in, cudaError_t out; knows nothing of XLA.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace jax_w4moe {

struct QuantizeFp8Params {
  const void* x;        // bf16[num_tokens, hidden_size]
  void* x_fp8;          // e4m3[num_tokens, hidden_size]
  float* x_scale;       // f32[num_tokens]
  int64_t num_tokens;   // >= 0
  int64_t hidden_size;  // >= 0; 0 only writes the scales
};

// Enqueues on `stream`; never synchronizes and never allocates, so it is legal under graph capture.
cudaError_t LaunchQuantizeFp8(const QuantizeFp8Params& params, cudaStream_t stream);

}  // namespace jax_w4moe
