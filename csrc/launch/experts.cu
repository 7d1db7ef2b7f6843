// The launches of experts.h: w13 with SwiGLU, requantise, w2.
#include <algorithm>

#include "launch/experts.h"
#include "launch/grouped_gemm.h"
#include "launch/token_image.h"

namespace jax_w4moe {
namespace {

TokenImage TakeImage(Arena& arena, int64_t panels, int64_t rows) {
  uint8_t* data = arena.Take<uint8_t>(panels * rows * 128);
  return {data, arena.Take<float>(rows), rows};
}

Records W13(const Experts& e) {
  return {static_cast<const uint8_t*>(e.w13), static_cast<int>(e.w13_row_blocks),
          static_cast<int>(e.w13_k_blocks)};
}

Records W2(const Experts& e) {
  return {static_cast<const uint8_t*>(e.w2), static_cast<int>(e.w2_row_blocks),
          static_cast<int>(e.w2_k_blocks)};
}

int WidthOfH(const Experts& e) { return static_cast<int>(e.w13_row_blocks) * 32; }

Epilogue FirstEpilogue(const Experts& e, const ExpertsWorkspace& ws, __nv_bfloat16* out) {
  return {EpilogueKind::kGated,
          Gated{ws.h, e.w13_bias, static_cast<int>(e.w13_row_blocks), e.activation},
          ScaledStore{out, e.w2_bias, static_cast<int>(e.hidden_size), false}};
}

}  // namespace

ExpertsWorkspace::ExpertsWorkspace(const Experts& experts, int64_t rows, Arena& arena)
    : plan(Plan::At(arena.Take<uint8_t>(Plan::Bytes(rows, experts.num_experts)))),
      row_tags(arena.Take<int>(rows)),
      x(TakeImage(arena, experts.w13_k_blocks * experts.operands.Panels(), rows)),
      h_image(TakeImage(arena, experts.w2_k_blocks * experts.operands.Panels(), rows)),
      h(arena.Take<__nv_bfloat16>(rows * experts.w13_row_blocks * 32)) {}

cudaError_t LaunchExperts(const Experts& e, const ExpertsWorkspace& ws, int num_rows,
                          bool plan_is_old, const FewPairs& few, __nv_bfloat16* out,
                          cudaStream_t stream) {
  int num_sms = 0;
  const cudaError_t status = NumSms(&num_sms);
  if (status != cudaSuccess) return status;
  // Experts are handed over one by one where w13's items can end at different times, more than one
  // on an SM, and there are not so many rows that counting them takes longer than it saves.
  constexpr int kMaxCountedRows = 1 << 14, kItemSlabs = 3;  // at most
  const bool by_counts = num_rows <= kMaxCountedRows &&
                         num_rows * ((e.w13_row_blocks + kItemSlabs - 1) / kItemSlabs) > num_sms;
  Epilogue epilogue = FirstEpilogue(e, ws, out);
  GroupedGemmParams first{W13(e),        ws.x.data, ws.x.row_scale, ws.plan,
                          ws.x.num_rows, 0,         plan_is_old,    few};
  first.counts_slabs = by_counts;
  LaunchGroupedGemm(e.operands, e.tile_tokens, first, epilogue, num_sms, stream);
  LaunchRequantize(Rows{ws.h, nullptr, WidthOfH(e), e.operands, e.h_rule}, num_rows,
                   Handover{ws.row_tags, ws.plan, by_counts, static_cast<int>(e.w13_row_blocks),
                            static_cast<int>(e.tile_tokens)},
                   ws.h_image, stream);
  epilogue.kind = EpilogueKind::kStore;
  GroupedGemmParams second{W2(e),   ws.h_image.data,     ws.h_image.row_scale,
                           ws.plan, ws.h_image.num_rows, 1,
                           true,    FewPairs{}};
  second.waits_for_rows = by_counts;
  second.num_experts = static_cast<int>(e.num_experts);
  LaunchGroupedGemm(e.operands, e.tile_tokens, second, epilogue, num_sms, stream);
  return cudaGetLastError();
}

bool TakesOneToken(const Experts& e) {
  return std::max(e.w13_k_blocks, e.w2_k_blocks) <= OneTokenBlocks(e.operands.Panels());
}

cudaError_t LaunchExpertsOfOneToken(const Experts& e, const ExpertsWorkspace& ws, const void* x,
                                    const int* topk_ids, int top_k, __nv_bfloat16* out,
                                    cudaStream_t stream) {
  int num_sms = 0;
  const cudaError_t status = NumSms(&num_sms);
  if (status != cudaSuccess) return status;
  OneTokenParams params{W13(e),
                        topk_ids,
                        top_k,
                        static_cast<int>(e.num_experts),
                        static_cast<const __nv_bfloat16*>(x),
                        static_cast<int>(e.hidden_size),
                        true,
                        e.operands.KOrder(),
                        e.x_rule};
  Epilogue epilogue = FirstEpilogue(e, ws, out);
  LaunchOneTokenGemm(e.operands, params, epilogue, num_sms, stream);
  params.weights = W2(e);
  params.rows = ws.h;
  params.width = WidthOfH(e);
  params.is_first = false;
  params.rule = e.h_rule;
  epilogue.kind = EpilogueKind::kStore;
  LaunchOneTokenGemm(e.operands, params, epilogue, num_sms, stream);
  return cudaGetLastError();
}

}  // namespace jax_w4moe
