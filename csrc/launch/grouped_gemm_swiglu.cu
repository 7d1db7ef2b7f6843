// The grouped GEMM with the epilogue SwiGlu.
#include "epilogue/swiglu.cuh"
#include "launch/grouped_gemm.cuh"

namespace jax_w4moe {

JAX_W4MOE_COMPILE_EPILOGUE(SwiGlu)

}  // namespace jax_w4moe
