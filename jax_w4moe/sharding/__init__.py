"""Experts on several devices: how packed weights are placed, and how tokens reach them.

An expert axis of the mesh holds whole experts (EP); a tensor axis holds slices of the intermediate
size (TP). The op runs in a ``shard_map`` that is manual over all axes of the mesh. Weights never
move. Tokens that are sharded over one of those axes are gathered, in one collective, or sent to the
devices that need them; every device computes what its weights give; and results are exchanged in
one collective (two, where many rows are wanted everywhere) and summed, or picked, at home in a
fixed order: activations are never reduced on the way, so a result does not depend on the other
tokens nor on timing.
"""

from jax_w4moe.sharding.dispatch import dispatched, is_dispatched
from jax_w4moe.sharding.entry import place, refuse_spread, run
from jax_w4moe.sharding.exchange import (
    add,
    as_slots,
    bring_home,
    gather,
    is_expert,
    local_ids,
    local_part,
    owners,
)
from jax_w4moe.sharding.partitioner import is_partitioned, partitioned
from jax_w4moe.sharding.placement import SLOT_ROWS, Placement, Tokens, put
from jax_w4moe.sharding.specs import expert_specs, shard_experts

__all__ = [
    "SLOT_ROWS",
    "Placement",
    "Tokens",
    "add",
    "as_slots",
    "bring_home",
    "dispatched",
    "expert_specs",
    "gather",
    "is_dispatched",
    "is_expert",
    "is_partitioned",
    "local_ids",
    "local_part",
    "owners",
    "partitioned",
    "place",
    "put",
    "refuse_spread",
    "run",
    "shard_experts",
]
