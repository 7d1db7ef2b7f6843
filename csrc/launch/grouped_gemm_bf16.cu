// The grouped GEMM with the epilogue ScaledStore<__nv_bfloat16>.
#include "epilogue/scaled_store.cuh"
#include "launch/grouped_gemm.cuh"

namespace jax_w4moe {

JAX_W4MOE_COMPILE_EPILOGUE(ScaledStore<__nv_bfloat16>)

}  // namespace jax_w4moe
