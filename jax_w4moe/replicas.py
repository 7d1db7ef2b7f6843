"""Several copies of hot experts, so that no device of an expert axis waits for another.

Routers know E logical experts; the weights on the mesh are P >= E physical ones, of which the hot
logical ones have several. Ids are translated after routing; results do not change by a bit, since
copies are equal.
"""

import dataclasses
import heapq
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Int32

from jax_w4moe import checks
from jax_w4moe.types import PackedExperts, PackedTensor


@dataclasses.dataclass(frozen=True)
class Replicas:
    """Which copies there are, and where.

    Attributes:
      physical_to_logical: i32[P], the logical expert of each physical one. Device d of D holds the
        physical ones from d * P / D on.
      logical_to_physical: i32[E, R], the copies of each logical expert; the first are repeated
        where there are fewer than R.
      num_copies: i32[E].
    """

    physical_to_logical: np.ndarray
    logical_to_physical: np.ndarray
    num_copies: np.ndarray

    def physical_ids(self, topk_ids: Int32[Array, "T k"]) -> Int32[Array, "T k"]:
        """Ids of copies: tokens take turns on them, by their number.

        Args:
          topk_ids: i32[T, k], logical; ids outside [0, E) stay "no expert".

        Returns:
          i32[T, k], physical, or -1.
        """
        valid = (topk_ids >= 0) & (topk_ids < self.num_copies.size)
        logical = jnp.where(valid, topk_ids, 0)
        turn = jnp.arange(topk_ids.shape[0], dtype=jnp.int32)[:, None]
        copy = turn % jnp.asarray(self.num_copies)[logical]
        return jnp.where(valid, jnp.asarray(self.logical_to_physical)[logical, copy], -1)


def plan_replicas(loads: Sequence[float], num_physical: int, num_devices: int) -> Replicas:
    """Plans copies from observed loads.

    Each copy beyond the first of every expert goes to the one whose copies carry most; then the
    copies, heaviest first, to the devices that carry least.

    Args:
      loads: of E logical experts: tokens, or anything in proportion to them.
      num_physical: P, copies in all; at least E, and a multiple of num_devices.
      num_devices: D, of the expert axis.

    Returns:
      The plan; the same for the same arguments.

    Raises:
      ValueError: counts or loads that do not fit.
    """
    load = np.asarray(loads, np.float64)
    num_experts = load.size
    if load.ndim != 1 or not num_experts or not np.all(np.isfinite(load) & (load >= 0)):
        raise ValueError(
            f"loads: shape {load.shape}, need one finite number, 0 or more, for each expert."
        )
    if num_devices < 1 or num_physical < num_experts or num_physical % num_devices:
        least = -(-num_experts // max(num_devices, 1)) * max(num_devices, 1)
        raise ValueError(
            f"num_physical={num_physical} does not hold {num_experts} experts in equal numbers on"
            f" {num_devices} devices; use a multiple of {max(num_devices, 1)} from {least} on."
        )
    copies = np.ones(num_experts, np.int32)
    heaviest = [(-value, expert) for expert, value in enumerate(load)]
    heapq.heapify(heaviest)
    for _ in range(num_physical - num_experts):
        expert = heaviest[0][1]
        copies[expert] += 1
        heapq.heapreplace(heaviest, (-load[expert] / copies[expert], expert))

    shares = [(load[e] / copies[e], e) for e in range(num_experts) for _ in range(copies[e])]
    room = num_physical // num_devices
    held: list[list[int]] = [[] for _ in range(num_devices)]
    lightest = [(0.0, device) for device in range(num_devices)]
    for share, expert in sorted(shares, key=lambda item: (-item[0], item[1])):
        carried, device = heapq.heappop(lightest)
        held[device].append(expert)
        if len(held[device]) < room:
            heapq.heappush(lightest, (carried + share, device))
    physical = np.array([expert for own in held for expert in sorted(own)], np.int32)
    where = [np.flatnonzero(physical == expert) for expert in range(num_experts)]
    most = int(copies.max())
    logical = np.stack([np.resize(places, most) for places in where]).astype(np.int32)
    return Replicas(physical, logical, copies)


def replicate_experts(experts: PackedExperts, replicas: Replicas) -> PackedExperts:
    """The P physical experts of a plan, from E logical ones; records are copied as they are.

    Args:
      experts: whole packed experts.
      replicas: a plan for as many.

    Returns:
      Packed experts, for :func:`jax_w4moe.shard_experts`.

    Raises:
      ValueError: a plan for another number of experts, or more than 1,024 copies.
    """
    checks.packed_experts(experts)
    if replicas.num_copies.size != experts.num_experts:
        raise ValueError(
            f"replicas: a plan for {replicas.num_copies.size} experts, the weights hold"
            f" E={experts.num_experts}; plan with as many loads."
        )
    count = replicas.physical_to_logical.size
    if count > checks.MAX_EXPERTS:
        raise ValueError(f"replicas: {count} copies, more than {checks.MAX_EXPERTS}; plan fewer.")
    copied: PackedExperts = jax.tree.map(lambda a: a[replicas.physical_to_logical], experts)

    def tensor(packed: PackedTensor) -> PackedTensor:
        return dataclasses.replace(packed, shape=(count, *packed.shape[1:]))

    return dataclasses.replace(copied, w13=tensor(copied.w13), w2=tensor(copied.w2))
