"""What a call of an op becomes: kernels or XLA, on one device or spread, and differentiable."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from jax_w4moe import implementation as implementations
from jax_w4moe import reference, sharding, tuning, varying
from jax_w4moe.activations import Activation
from jax_w4moe.ops.expert_mlp import expert_mlp_cuda
from jax_w4moe.ops.fused_moe import fused_moe_cuda
from jax_w4moe.ops.grouped_matmul import grouped_matmul_cuda
from jax_w4moe.ops.quantize_fp8 import quantize_fp8_cuda
from jax_w4moe.quantization import (
    Per128,
    PerToken,
    ScaleRule,
    operand_dtype,
    quantize,
    quantize_per_token,
    round_to_bf16,
)
from jax_w4moe.sharding import Tokens
from jax_w4moe.transforms import transformable
from jax_w4moe.tuning import Problem, Tactic
from jax_w4moe.types import PackedExperts, PackedTensor

_BFLOAT16 = jnp.dtype(jnp.bfloat16)


class How(NamedTuple):
    """What is static of a call, and stays what it is whatever the tactic."""

    choice: implementations.Choice
    activation: Activation
    act_dtype: jnp.dtype
    act_scale: ScaleRule

    @property
    def operand_dtype(self) -> jnp.dtype:
        """What the kernels are given, and what travels between devices."""
        return operand_dtype(self.act_dtype, self.act_scale)


class Rows(NamedTuple):
    rows: Array
    x_scale: Array | None


class Row(NamedTuple):
    x: Array


# The ops are cached by what is static, so that JAX meets the same function again; the tactic is
# chosen where the shapes are known for good, after vmap.

_differentiable_moe = functools.partial(
    transformable, "fused_moe", differentiable=("x", "topk_weights"), foldable=True
)


@functools.cache
def fused_moe(
    how: How,
    tactic: Tactic | None,
    slot_dtype: Any = _BFLOAT16,
) -> Any:
    def xla(tokens: Tokens, experts: PackedExperts) -> Array:
        return reference.fused_moe(
            tokens.x,
            experts,
            tokens.topk_ids,
            tokens.topk_weights,
            x_scale=tokens.x_scale,
            activation=how.activation,
            act_dtype=how.act_dtype,
            act_scale=how.act_scale,
            mode="mirrored",
            slot_dtype=slot_dtype,
        )

    def cuda(tokens: Tokens, experts: PackedExperts) -> Array:
        x, x_scale, ids, weights = tokens
        act_dtype = how.operand_dtype
        problem = Problem.of_layer("fused_moe", experts, ids.size, act_dtype)
        chosen = tuning.choose(problem, tactic).tactic
        return fused_moe_cuda(
            x, x_scale, experts, ids, weights, act_dtype, how.act_scale, how.activation, chosen
        )

    def run(tokens: Tokens, experts: PackedExperts) -> Array:
        return implementations.run(how.choice, cuda, xla, tokens, experts)

    def backward(tokens: Tokens, experts: PackedExperts, cotangent: Array) -> dict[str, Array]:
        x, x_scale, ids, weights = tokens
        dx, dweights = reference.fused_moe_gradients(
            x, experts, ids, weights, x_scale, cotangent, how.activation
        )
        return {"x": dx.astype(x.dtype), "topk_weights": dweights}

    return _differentiable_moe(run, backward=backward)


@functools.cache
def spread_moe(
    how: How,
    tactic: Tactic | None,
    placement: sharding.Placement,
) -> Any:
    """The layer inside a shard_map over the placement's axes; operands are this device's parts."""

    def backward(tokens: Tokens, experts: PackedExperts, cotangent: Array) -> dict[str, Array]:
        part = sharding.local_part(experts, placement)
        everyone, cotangent = sharding.gather((tokens, cotangent), placement)
        x, x_scale, ids, weights = everyone
        ids = sharding.local_ids(ids, experts, placement)
        dx, dweights = reference.fused_moe_gradients(
            x, part, ids, weights, x_scale, cotangent, how.activation
        )
        both = sharding.bring_home(jnp.concatenate([dx, dweights], axis=1), placement)
        dx, dweights = jnp.split(both, [dx.shape[1]], axis=1)
        return {
            "x": varying.vary(dx.astype(tokens.x.dtype), varying.axes_of(tokens.x)),
            "topk_weights": varying.vary(dweights, varying.axes_of(tokens.topk_weights)),
        }

    run = _spread_run(how, tactic, placement)
    return _differentiable_moe(run, backward=backward)


@functools.cache
def partitioned_moe(
    how: How,
    tactic: Tactic | None,
) -> Any:
    """The layer in a program whose weights XLA's partitioner finds spread; without gradients."""
    run = functools.partial(_spread_run, how, tactic)
    name = "fused_moe without expert_axis or tensor_axis on weights that are spread"
    return transformable(name, functools.partial(sharding.partitioned, run), foldable=True)


@functools.cache
def _spread_run(
    how: How,
    tactic: Tactic | None,
    placement: sharding.Placement,
) -> Callable[[Tokens, PackedExperts], Array]:
    """What a device does of the layer, exchange included."""
    is_fp8 = how.operand_dtype == jnp.float8_e4m3fn
    layer = fused_moe(how, tactic)
    # A slot that is summed over a tensor axis is rounded after the sum, as on one device. With FP8
    # the slices' own scales differ from one device's by more than that.
    is_rounded_late = placement.tensor_axis is not None and not is_fp8
    slot_layer = layer
    if is_rounded_late and placement.exchange == sharding.SLOT_ROWS:
        what = "act_dtype=bfloat16 with exchange='slot_rows' over a tensor axis"
        own = implementations.without_kernel("fused_moe", how.choice, what)
        slot_layer = fused_moe(how._replace(choice=own), tactic, jnp.dtype(jnp.float32))

    def run(tokens: Tokens, experts: PackedExperts) -> Array:
        part = sharding.local_part(experts, placement)
        topk_ids, topk_weights = tokens.topk_ids, tokens.topk_weights
        rule = how.act_scale
        is_quantized = is_fp8 and tokens.x_scale is None
        if placement.gathered_axes and is_quantized and not isinstance(rule, Per128):
            quantized = functools.partial(quantize, rule=rule)
            kernel = quantize_fp8_cuda if rule == PerToken() else quantized
            x, x_scale = implementations.run(how.choice, kernel, quantized, tokens.x)
            tokens = tokens._replace(x=x, x_scale=x_scale)

        def local(tokens: Tokens) -> Tokens:
            return tokens._replace(topk_ids=sharding.local_ids(tokens.topk_ids, experts, placement))

        def partial_sums(tokens: Tokens) -> Array:
            return layer(local(tokens), part)

        if placement.exchange == sharding.SLOT_ROWS:
            everyone = sharding.gather(tokens, placement)
            slots = slot_layer(sharding.as_slots(local(everyone)), part)
            slots = slots.reshape(everyone.topk_ids.shape[0], -1)
            slots = sharding.bring_home(slots, placement)
            if is_rounded_late:
                slots = round_to_bf16(slots)
            slots = slots.reshape(*topk_ids.shape, -1)
            valid = sharding.is_expert(topk_ids, experts)
            y = reference.combine(lambda slot: slots[:, slot], valid, topk_weights)
            return y.astype(jnp.bfloat16)
        if sharding.is_dispatched(placement, *topk_ids.shape):
            owners = sharding.owners(topk_ids, experts)
            sums = sharding.dispatched(partial_sums, tokens, owners, placement)
            return sharding.add(sums, jnp.bfloat16, placement)
        return sharding.bring_home(partial_sums(sharding.gather(tokens, placement)), placement)

    return run


@functools.cache
def expert_mlp(
    how: How,
    tactic: Tactic | None,
) -> Any:
    def xla(tokens: Rows, fixed: tuple[PackedExperts, Array]) -> Array:
        return reference.expert_mlp(
            tokens.rows,
            *fixed,
            x_scale=tokens.x_scale,
            activation=how.activation,
            act_dtype=how.act_dtype,
            act_scale=how.act_scale,
            mode="mirrored",
        )

    def cuda(tokens: Rows, fixed: tuple[PackedExperts, Array]) -> Array:
        num_rows = math.prod(tokens.rows.shape[:-1])
        problem = Problem.of_layer("expert_mlp", fixed[0], num_rows, how.operand_dtype)
        chosen = tuning.choose(problem, tactic).tactic
        return expert_mlp_cuda(
            *tokens, *fixed, how.operand_dtype, how.act_scale, how.activation, chosen
        )

    def run(tokens: Rows, fixed: tuple[PackedExperts, Array]) -> Array:
        return implementations.run(how.choice, cuda, xla, tokens, fixed)

    def backward(
        tokens: Rows, fixed: tuple[PackedExperts, Array], cotangent: Array
    ) -> dict[str, Array]:
        gradient = reference.expert_mlp_gradient(
            tokens.rows, *fixed, tokens.x_scale, cotangent, how.activation
        )
        return {"rows": gradient.astype(tokens.rows.dtype)}

    return transformable("expert_mlp", run, backward=backward, differentiable=("rows",))


@functools.cache
def grouped_matmul(
    how: How,
    out_dtype: jnp.dtype,
    tactic: Tactic | None,
) -> Any:
    def xla(tokens: Rows, fixed: tuple[PackedTensor, Array]) -> Array:
        out = reference.grouped_matmul(
            tokens.rows,
            *fixed,
            x_scale=tokens.x_scale,
            act_dtype=how.act_dtype,
            act_scale=how.act_scale,
            mode="mirrored",
        )
        return out.astype(out_dtype)

    def cuda(tokens: Rows, fixed: tuple[PackedTensor, Array]) -> Array:
        problem = Problem.of_matmul(fixed[0], tokens.rows.shape[0], how.operand_dtype)
        chosen = tuning.choose(problem, tactic).tactic
        return grouped_matmul_cuda(
            *tokens, *fixed, how.operand_dtype, how.act_scale, out_dtype, chosen
        )

    def run(tokens: Rows, fixed: tuple[PackedTensor, Array]) -> Array:
        return implementations.run(how.choice, cuda, xla, tokens, fixed)

    def backward(
        tokens: Rows, fixed: tuple[PackedTensor, Array], cotangent: Array
    ) -> dict[str, Array]:
        gradient = reference.grouped_matmul_gradient(*fixed, cotangent)
        return {"rows": gradient.astype(tokens.rows.dtype)}

    return transformable("grouped_matmul", run, backward=backward, differentiable=("rows",))


@functools.cache
def quantize_fp8(choice: implementations.Choice) -> Any:
    def run(tokens: Row, _: tuple[()]) -> tuple[Array, Array]:
        return implementations.run(choice, quantize_fp8_cuda, quantize_per_token, tokens.x)

    return transformable("quantize_fp8", run, foldable=True)
