// The launches of experts.h: w13 with SwiGLU, requantise, w2.
#include "epilogue/scaled_store.cuh"
#include "epilogue/swiglu.cuh"
#include "launch/experts.h"
#include "launch/grouped_gemm.h"
#include "launch/token_image.h"

namespace jax_w4moe {
namespace {

TokenImage TakeImage(Arena& arena, int64_t k_blocks, int64_t rows) {
  uint8_t* data = arena.Take<uint8_t>(k_blocks * rows * 128);
  return {data, arena.Take<float>(rows), rows};
}

}  // namespace

ExpertsWorkspace::ExpertsWorkspace(const Experts& experts, int64_t rows, Arena& arena)
    : plan(Plan::At(arena.Take<uint8_t>(Plan::kBytes))),
      row_phase(arena.Take<int>(rows)),
      x(TakeImage(arena, experts.w13_k_blocks, rows)),
      h_image(TakeImage(arena, experts.w2_k_blocks, rows)),
      h(arena.Take<__nv_bfloat16>(rows * experts.w13_row_blocks * 32)) {}

cudaError_t PrepareExperts() {
  const cudaError_t status = PrepareGroupedGemm<SwiGlu>();
  return status == cudaSuccess ? PrepareGroupedGemm<ScaledStore<__nv_bfloat16>>() : status;
}

cudaError_t LaunchExperts(const Experts& e, const ExpertsWorkspace& ws, int num_rows,
                          __nv_bfloat16* out, cudaStream_t stream) {
  int num_sms = 0;
  const cudaError_t status = NumSms(&num_sms);
  if (status != cudaSuccess) return status;
  const int experts = static_cast<int>(e.num_experts);
  const int slabs = static_cast<int>(e.w13_row_blocks);
  const int hidden = static_cast<int>(e.hidden_size);
  LaunchGroupedGemm(
      e.tile_tokens,
      GroupedGemmParams{static_cast<const uint8_t*>(e.w13), ws.x.data, ws.x.row_scale, ws.plan,
                        experts, slabs, static_cast<int>(e.w13_k_blocks), ws.x.num_rows, 0, false},
      SwiGlu{ws.h, e.w13_bias, slabs, e.alpha, e.beta, e.limit}, num_sms, stream);
  LaunchRequantize(ws.h, slabs * 32, num_rows, ws.row_phase, ws.h_image, stream);
  LaunchGroupedGemm(
      e.tile_tokens,
      GroupedGemmParams{static_cast<const uint8_t*>(e.w2), ws.h_image.data, ws.h_image.row_scale,
                        ws.plan, experts, static_cast<int>(e.w2_row_blocks),
                        static_cast<int>(e.w2_k_blocks), ws.h_image.num_rows, 1, true},
      ScaledStore<__nv_bfloat16>{out, e.w2_bias, hidden, false}, num_sms, stream);
  return cudaGetLastError();
}

}  // namespace jax_w4moe
