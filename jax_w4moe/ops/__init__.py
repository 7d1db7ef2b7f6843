"""CUDA ops: one module each, which holds the shape rule and the one FFI call."""
