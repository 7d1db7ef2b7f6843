"""Meshes of the first devices, and what a layer is told of them."""

import itertools
import math
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

AXES = ("expert", "tensor")


def make_mesh(shape: tuple[int, ...], kind: AxisType = AxisType.Auto, axes: Any = AXES) -> Mesh:
    """Of the devices in their order, of each process in turn; skips where there are too few."""
    count = math.prod(shape)
    each = jax.local_device_count()
    devices = list(itertools.chain(*(jax.devices()[i::each] for i in range(each))))
    if len(devices) < count:
        pytest.skip(f"{count} devices are needed, here are {len(devices)}.")
    grid = np.array(devices[:count]).reshape(shape)
    return Mesh(grid, axes, axis_types=(kind,) * len(shape))


def named(mesh: Mesh) -> dict[str, str]:
    """The axes of a mesh that have more than one device, as arguments of a layer."""
    return {f"{axis}_axis": axis for axis in AXES if mesh.shape[axis] > 1}
