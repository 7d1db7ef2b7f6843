"""What is chosen, ``Tactic``, and what it is chosen for, ``Problem``."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from jax_w4moe.formats import MXFP4
from jax_w4moe.ops import tiles
from jax_w4moe.types import PackedExperts, PackedTensor

OPS = ("fused_moe", "expert_mlp", "grouped_matmul")


@dataclasses.dataclass(frozen=True)
class Tactic:
    """How a kernel goes about its work. Results do not depend on it, bit for bit.

    Attributes:
      tile_tokens: tokens of a tile of the grouped GEMM at most; one of the compiled tiles.
    """

    tile_tokens: int


@dataclasses.dataclass(frozen=True)
class Problem:
    """The static shapes that a tactic is chosen for, on one device.

    Attributes:
      op: "fused_moe", "expert_mlp" or "grouped_matmul".
      hidden_size: H; for grouped_matmul K.
      intermediate_size: I; for grouped_matmul N.
      num_experts: E, on this device.
      num_rows: (token, slot) pairs, or rows. ``num_rows / num_experts`` are expected per expert.
      act_dtype: the name of what activations are rounded to.
      format: the name of the weight format.

    Raises:
      ValueError: an unknown op.
    """

    op: str
    hidden_size: int
    intermediate_size: int
    num_experts: int
    num_rows: int
    act_dtype: str = "float8_e4m3fn"
    format: str = MXFP4.name

    def __post_init__(self) -> None:
        if self.op not in OPS:
            raise ValueError(f"op={self.op!r} has no tactics; use one of {', '.join(OPS)}.")

    @classmethod
    def of_layer(
        cls, op: str, experts: PackedExperts, num_rows: int, act_dtype: Any = jnp.float8_e4m3fn
    ) -> "Problem":
        """A layer's, by its packed experts."""
        sizes = (experts.hidden_size, experts.intermediate_size, experts.w13.data.shape[0])
        return cls(op, *sizes, num_rows, jnp.dtype(act_dtype).name, experts.format.name)

    @classmethod
    def of_matmul(
        cls, rhs: PackedTensor, num_rows: int, act_dtype: Any = jnp.float8_e4m3fn
    ) -> "Problem":
        """A grouped_matmul's."""
        sizes = (rhs.shape[2], rhs.shape[1], rhs.data.shape[0])
        names = (jnp.dtype(act_dtype).name, rhs.format.name)
        return cls("grouped_matmul", *sizes, num_rows, *names)

    def key(self) -> "Problem":
        """The problem that measured times are filed under: rows rounded up to three bits."""
        step = 1 << max(0, self.num_rows.bit_length() - 3)
        return dataclasses.replace(self, num_rows=-(-self.num_rows // step) * step)


def alike(problem: Problem) -> tuple[Problem, ...]:
    """Problems whose measured times may be used, the best first: formats differ little."""
    key = problem.key()
    as_mxfp4 = dataclasses.replace(key, format=MXFP4.name)
    return (key,) if key == as_mxfp4 else (key, as_mxfp4)


def tactics(problem: Problem) -> tuple[Tactic, ...]:
    """All tactics that are legal for a problem, in ascending order: every compiled tile."""
    return tuple(map(Tactic, sorted(tiles.compiled(problem.format, problem.act_dtype))))


def check(problem: Problem, tactic: Any) -> None:
    """Checks the ``tactic`` argument of an op.

    Raises:
      TypeError: neither None nor a Tactic.
      ValueError: a tactic that is not legal.
    """
    if tactic is None:
        return
    if not isinstance(tactic, Tactic):
        raise TypeError(
            f"tactic: got {type(tactic).__name__}, need a Tactic; tactics() lists them."
        )
    if tactic not in tactics(problem):
        legal = ", ".join(map(str, tactics(problem)))
        raise ValueError(f"{tactic} is not compiled; use one of {legal}.")
