"""Which devices a model is spread over, from two numbers."""

from typing import Any

import jax
from jax.sharding import AxisType


def spread_over(expert_parallel: int = 0, tensor_parallel: int = 1) -> dict[str, Any]:
    """The options of :meth:`jax_w4moe.models.GptOss.from_pretrained` that spread a model.

    Args:
      expert_parallel: devices to spread experts over; without slices of them with the bits of one
        device (``exchange="slot_rows"``). 0: all devices of several processes, or one.
      tensor_parallel: devices to slice experts over.

    Returns:
      Keywords; none for one device.

    Raises:
      ValueError: not so many devices, or devices of a process that would have no part.
    """
    devices, several = jax.devices(), jax.process_count() > 1
    experts = expert_parallel or (max(1, len(devices) // tensor_parallel) if several else 1)
    wanted = experts * tensor_parallel
    if wanted > len(devices) or (several and wanted != len(devices)):
        need = "as many" if several else "no more"
        raise ValueError(
            f"expert_parallel={experts} times tensor_parallel={tensor_parallel} is {wanted}, but"
            f" there are {len(devices)} devices; ask for {need}."
        )
    if wanted == 1:
        return {}
    mesh = jax.make_mesh(
        (experts, tensor_parallel),
        ("expert", "tensor"),
        axis_types=(AxisType.Auto,) * 2,
        devices=devices[:wanted],
    )
    options: dict[str, Any] = {"mesh": mesh}
    if tensor_parallel > 1:
        options["tensor_axis"] = "tensor"
    else:
        options["exchange"] = "slot_rows"
    if experts > 1:
        options["expert_axis"] = "expert"
    return options
