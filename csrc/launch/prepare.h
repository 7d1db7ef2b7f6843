// What has to be done on a device before the grouped GEMM is launched there.
#pragma once

#include <cuda_runtime_api.h>

#include "formats/formats.h"

namespace jax_w4moe {

// Raises the shared-memory limit of every tile for these operands on the current device.
cudaError_t PrepareGroupedGemm(Operands operands);

}  // namespace jax_w4moe
