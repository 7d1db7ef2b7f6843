"""The next token of every row, on the device: greedy, or drawn with a temperature and top-p."""

import jax
import jax.numpy as jnp
from jax import Array


def sample(
    logits: Array, seeds: Array, positions: Array, temperature: Array, top_p: Array
) -> Array:
    """Chooses a token for every row by itself.

    A draw is a function of the row's logits, seed and position: it is the same in any company.

    Args:
      logits: f32[n, V].
      seeds: u32[n], of every row's request.
      positions: i32[n], of the tokens that are chosen, from the begin of their sequences.
      temperature: f32[n]; 0 takes the likeliest token.
      top_p: f32[n] in (0, 1]; draws among the likeliest tokens that together have this probability.

    Returns:
      i32[n]; -1 for a row whose logits are NaN.
    """
    likeliest = jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def draw() -> Array:
        # Differences to the maximum: no temperature is so low that they overflow.
        scaled = logits - jnp.max(logits, axis=-1, keepdims=True)
        scaled = scaled / jnp.where(temperature > 0, temperature, 1.0)[:, None]
        all_tokens = jnp.ones(logits.shape, jnp.bool_)
        kept = jax.lax.cond(jnp.any(top_p < 1), lambda: _nucleus(scaled, top_p), lambda: all_tokens)
        keys = jax.vmap(jax.random.fold_in)(jax.vmap(jax.random.key)(seeds), positions)
        noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(keys)
        drawn = jnp.argmax(jnp.where(kept, scaled + noise, -jnp.inf), axis=-1)
        return jnp.where(temperature > 0, drawn.astype(jnp.int32), likeliest)

    ids = jax.lax.cond(jnp.any(temperature > 0), draw, lambda: likeliest)
    return jnp.where(jnp.any(jnp.isnan(logits), axis=-1), -1, ids)


def _nucleus(scaled: Array, top_p: Array) -> Array:
    """Tokens such that those likelier than them have less than ``top_p`` together, bool[n, V].

    The threshold is found by bisection over the bits of a probability, which are ordered as it is:
    31 sums of a row instead of sorting it.
    """
    probabilities = jax.nn.softmax(scaled, axis=-1)
    bits = jax.lax.bitcast_convert_type(probabilities, jnp.int32)

    def halve(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = low + (high - low) // 2
        mass = jnp.sum(jnp.where(bits >= middle[:, None], probabilities, 0.0), axis=-1)
        enough = mass >= top_p
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    low = jnp.zeros(top_p.shape, jnp.int32)
    high = jnp.full(top_p.shape, 0x40000000, jnp.int32)  # 2.0
    low, _ = jax.lax.fori_loop(0, 31, halve, (low, high))
    # Where all are wanted, rounding of the sum must not leave out the least likely.
    return (bits >= low[:, None]) | (top_p >= 1)[:, None]
