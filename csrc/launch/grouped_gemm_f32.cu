// The grouped GEMM with the epilogue ScaledStore<float>.
#include "epilogue/scaled_store.cuh"
#include "launch/grouped_gemm.cuh"

namespace jax_w4moe {

JAX_W4MOE_COMPILE_EPILOGUE(ScaledStore<float>)

}  // namespace jax_w4moe
