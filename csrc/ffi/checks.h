// Checks that every handler repeats although Python made them at trace time: a program may come
// from jax.export or another version of the package.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string_view>

#include "formats/formats.h"
#include "xla/ffi/api/ffi.h"

namespace jax_w4moe {

// The current device must be compute capability 9.0, the only one the kernels are compiled for.
xla::ffi::Error CheckDevice(const char* op);

// `buffer` must have this dtype and rank.
xla::ffi::Error CheckType(const char* op, const char* name, xla::ffi::AnyBuffer buffer,
                          xla::ffi::DataType dtype, size_t rank);

// `buffer` must have exactly these dimensions (and so this rank).
xla::ffi::Error CheckShape(const char* op, const char* name, xla::ffi::AnyBuffer buffer,
                           std::initializer_list<int64_t> expected);

// Rows [num_rows, width] come as bf16, with x_scale of no elements, or as f8e4m3fn with x_scale
// [num_rows, 1]; where activations are bf16, as the former.
xla::ffi::Error CheckRows(const char* op, const char* name, xla::ffi::AnyBuffer rows,
                          xla::ffi::AnyBuffer x_scale, bool is_bf16);

// The data of an operand that may be left out, by giving one of no elements.
const float* Optional(xla::ffi::AnyBuffer buffer);

// A format of this name must be compiled.
xla::ffi::Error ReadOperands(const char* op, std::string_view format, bool is_bf16,
                             Operands* operands);

// A tile of so many tokens must be compiled.
xla::ffi::Error CheckTile(const char* op, int64_t tile_tokens, Operands operands);

// The workspace must have `needed` bytes.
xla::ffi::Error CheckWorkspace(const char* op, xla::ffi::AnyBuffer workspace, int64_t needed);

// Buffers that bulk copies read start at 128 bytes.
xla::ffi::Error CheckAligned(const char* op, std::initializer_list<const void*> pointers);

}  // namespace jax_w4moe
