// The table of all ops: what module.cc hands to Python. A new op adds one line to it.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>

#include "xla/ffi/api/ffi.h"

namespace jax_w4moe {

struct Op {
  const char* name;                   // as Python calls it
  const char* target;                 // FFI target name, carries the layout version
  XLA_FFI_Handler* initialize;        // once per executable and device: device checks
  XLA_FFI_Handler* execute;           // launches only; may run under graph capture
  const std::atomic<int64_t>* calls;  // executions of the handler, not of replayed graphs
};

Op ExpertMlpOp();
Op FusedMoeOp();
Op GroupedMatmulOp();
Op QuantizeFp8Op();

inline std::array<Op, 4> Ops() {
  return {ExpertMlpOp(), FusedMoeOp(), GroupedMatmulOp(), QuantizeFp8Op()};
}

}  // namespace jax_w4moe
