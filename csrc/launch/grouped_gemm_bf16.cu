// The grouped GEMM with the epilogues of a layer.
#include "launch/grouped_gemm.cuh"

namespace jax_w4moe {

JAX_W4MOE_COMPILE_EPILOGUE(LayerEpilogue)

}  // namespace jax_w4moe
