// The version of everything Python and C++ must agree on: packed bytes, attributes, operands.
//
// It is part of every FFI target name (jax_w4moe_<op>_v<version>), so that a program exported with
// one version is refused by name, not misread, by a build with another. Python's copy is
// LAYOUT_VERSION in jax_w4moe/formats/layout.py; jax_w4moe/_ffi.py compares the two.
#pragma once

#define JAX_W4MOE_LAYOUT_VERSION 1
#define JAX_W4MOE_STRINGIZE_(x) #x
#define JAX_W4MOE_STRINGIZE(x) JAX_W4MOE_STRINGIZE_(x)

// The FFI target name of an op, e.g. JAX_W4MOE_TARGET("quantize_fp8").
#define JAX_W4MOE_TARGET(op) "jax_w4moe_" op "_v" JAX_W4MOE_STRINGIZE(JAX_W4MOE_LAYOUT_VERSION)

namespace jax_w4moe {

inline constexpr int kLayoutVersion = JAX_W4MOE_LAYOUT_VERSION;

}  // namespace jax_w4moe
