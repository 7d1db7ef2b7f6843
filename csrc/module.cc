// Python module jax_w4moe._sm90: hands the FFI handlers to jax_w4moe/_ffi.py and nothing else.
#include <cuda_runtime_api.h>
#include <nanobind/nanobind.h>

#include <string_view>

#include "common/version.h"
#include "ffi/ops.h"

namespace nb = nanobind;

namespace {

nb::capsule Capsule(XLA_FFI_Handler* handler) {
  return nb::capsule(reinterpret_cast<void*>(handler));
}

// {target name: {stage: capsule}}, as jax.ffi.register_ffi_target takes it.
nb::dict Registrations() {
  nb::dict targets;
  for (const jax_w4moe::Op& op : jax_w4moe::Ops()) {
    nb::dict stages;
    stages["initialize"] = Capsule(op.initialize);
    stages["execute"] = Capsule(op.execute);
    targets[op.target] = stages;
  }
  return targets;
}

int64_t CallCount(const char* name) {
  for (const jax_w4moe::Op& op : jax_w4moe::Ops()) {
    if (std::string_view(name) == op.name) return op.calls->load(std::memory_order_relaxed);
  }
  throw nb::key_error(name);
}

nb::dict BuildInfo() {
  nb::dict info;
  info["layout_version"] = jax_w4moe::kLayoutVersion;
  info["cuda_runtime_version"] = CUDART_VERSION;
  info["ffi_api_version"] = nb::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR);
  info["arch"] = JAX_W4MOE_ARCH;
  return info;
}

}  // namespace

NB_MODULE(_sm90, m) {
  m.doc() = "CUDA kernels of jax_w4moe for compute capability 9.0.";
  m.def("registrations", &Registrations, "FFI target name -> stage -> capsule.");
  m.def("call_count", &CallCount, nb::arg("name"),
        "How often the op's execute handler has run; a replayed CUDA graph does not run it.");
  m.def("build_info", &BuildInfo, "Versions this module was built with.");
}
