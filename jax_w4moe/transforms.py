"""How the ops behave under JAX's transformations: what is supported, and the refusal of the rest.

Every op is ``custom_vjp(custom_vmap(run))`` over two arguments: ``tokens``, a NamedTuple of arrays
with one row per token, and ``fixed``, everything else (packed weights, group sizes).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.custom_derivatives import SymbolicZero


def transformable(
    name: str,
    run: Callable[[Any, Any], Any],
    *,
    backward: Callable[[Any, Any, Any], dict[str, Any]] | None = None,
    differentiable: tuple[str, ...] = (),
    foldable: bool = False,
) -> Callable[[Any, Any], Any]:
    """Wraps ``run(tokens, fixed)`` with its rules.

    Args:
      name: the op's name, for the sentences.
      run: the op itself.
      backward: (tokens, fixed, cotangent) -> gradients of the fields in ``differentiable``.
      differentiable: the fields of ``tokens`` that have a gradient.
      foldable: whether a batch axis on ``tokens`` may be folded into its rows.

    Returns:
      A function of (tokens, fixed). ``vmap`` over tokens folds into rows where that is right;
      reverse mode gives the gradients of ``backward``; all else raises NotImplementedError.
    """
    batched = custom_vmap(run)

    @batched.def_vmap
    def fold(axis_size: int, in_batched: Any, tokens: Any, fixed: Any) -> tuple[Any, Any]:
        tokens_batched, fixed_batched = in_batched
        if any(jax.tree.leaves(fixed_batched)):
            raise NotImplementedError(
                f"{name}: vmap over weights or group sizes is not supported; give the weights one"
                " expert axis instead, or use jax.lax.map."
            )
        if not foldable:
            raise NotImplementedError(
                f"{name}: vmap is not supported; put all rows in one call, or use jax.lax.map."
            )

        def rows(array: jax.Array, is_batched: bool) -> jax.Array:
            if not is_batched:
                array = jnp.broadcast_to(array[None], (axis_size, *array.shape))
            return array.reshape(-1, *array.shape[2:])

        out = batched(jax.tree.map(rows, tokens, tokens_batched), fixed)
        out = jax.tree.map(lambda a: a.reshape(axis_size, -1, *a.shape[1:]), out)
        return out, jax.tree.map(lambda _: True, out)

    function = jax.custom_vjp(batched)

    def forward(tokens: Any, fixed: Any) -> tuple[Any, Any]:
        for field, primal in zip(tokens._fields, tokens, strict=True):
            if _perturbed(primal) and not (backward and field in differentiable):
                raise NotImplementedError(
                    f"{name}: no gradient to {field};"
                    f" differentiable: {', '.join(differentiable) or 'nothing'}. Stop it with"
                    " jax.lax.stop_gradient."
                )
            if _perturbed(primal) and primal.value.dtype == jnp.float8_e4m3fn:
                raise NotImplementedError(
                    f"{name}: no gradient to a float8_e4m3fn {field}; pass it as bfloat16."
                )
        if any(map(_perturbed, jax.tree.leaves(fixed, is_leaf=_is_primal))):
            raise NotImplementedError(
                f"{name}: no gradient to packed weights or their biases; stop it with"
                " jax.lax.stop_gradient, or differentiate only what is an nnx.Param."
            )
        values = jax.tree.map(lambda p: p.value, (tokens, fixed), is_leaf=_is_primal)
        return batched(*values), values

    def backwards(residuals: Any, cotangent: Any) -> tuple[Any, None]:
        tokens, fixed = residuals
        assert backward is not None  # forward() refused every gradient otherwise
        if isinstance(cotangent, SymbolicZero):
            cotangent = jnp.zeros(cotangent.shape, cotangent.dtype)
        gradients = backward(tokens, fixed, cotangent)
        return type(tokens)(*(gradients.get(field) for field in tokens._fields)), None

    function.defvjp(forward, backwards, symbolic_zeros=True)

    def call(tokens: Any, fixed: Any) -> Any:
        try:
            return function(tokens, fixed)
        except TypeError as error:
            if "forward-mode" not in str(error):
                raise
            raise NotImplementedError(
                f"{name}: forward mode (jvp, jacfwd, linearize) is not supported; use reverse mode"
                " (grad, vjp, jacrev)."
            ) from error

    return call


def _is_primal(leaf: Any) -> bool:
    return hasattr(leaf, "perturbed")


def _perturbed(primal: Any) -> bool:
    return _is_primal(primal) and bool(primal.perturbed)
