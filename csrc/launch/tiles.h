// What handlers need to know of the compiled tiles.
#pragma once

#include <cstdint>

namespace jax_w4moe {

// Whether a tile of that many tokens is compiled.
bool HasTile(int64_t tile_tokens);

}  // namespace jax_w4moe
