// NVFP4 records on the device: half an instruction multiplies a group of 16, and its product is
// promoted by itself.
#pragma once

#include <cuda_fp8.h>

#include "formats/e2m1.cuh"

namespace jax_w4moe {

struct Nvfp4 : E2m1Codes {
  // Eight E4M3 bytes and an f32, of row g and of row g + 8.
  struct Scales {
    uint32_t bytes[2][2];
    float row[2];
  };
  static __device__ __forceinline__ Scales LoadScales(uint32_t record, const RecordThread& thread) {
    const uint32_t at = record + kCodeBytes + thread.scales * 3;
    const uint2 a = ptx::LoadShared64(at), b = ptx::LoadShared64(at + 8),
                c = ptx::LoadShared64(at + 16);
    return {{{a.x, a.y}, {b.y, c.x}}, {__uint_as_float(b.x), __uint_as_float(c.y)}};
  }
  // fl(E4M3 * row), as jax_w4moe/formats/nvfp4.py has it.
  static __device__ __forceinline__ float Scale(const Scales& s, int group, int half) {
    const uint32_t byte = s.bytes[half][group / 4] >> 8 * (group % 4) & 0xff;
    const __half_raw value =
        __nv_cvt_fp8_to_halfraw(static_cast<__nv_fp8_storage_t>(byte), __NV_E4M3);
    return __half2float(__half(value)) * s.row[half];
  }
};

}  // namespace jax_w4moe
