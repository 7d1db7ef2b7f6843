"""Modules on disk, packed weights as they are: from any mesh onto any other, with Orbax."""

import functools
import os
from typing import Any

import orbax.checkpoint as ocp
from flax import nnx

from jax_w4moe.flax.layer import FusedMoE, PackedWeight


def save(path: str | os.PathLike[str], module: nnx.Module) -> None:
    """Writes a module's state, packed weights as they are, with Orbax.

    Args:
      path: a folder that does not exist yet.
      module: any NNX module, of which FusedMoE layers may be parts.
    """
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(os.path.abspath(path), nnx.to_pure_dict(nnx.state(module)))


def restore(path: str | os.PathLike[str], module: nnx.Module) -> None:
    """Reads what :func:`save` wrote into a module of the same structure, in place.

    Packed weights restore onto any mesh, whichever they were saved from: what was appended for one
    is dropped, what the other one needs is appended. With an abstract module every process reads
    the parts of its own devices only::

        model = nnx.eval_shape(lambda: Model(...))
        for layer in model.layers:
            layer.moe.shard(mesh)
        restore(path, model)

    Args:
      path: the folder.
      module: the module, possibly abstract (``nnx.eval_shape``); its arrays' shardings are kept.

    Raises:
      ValueError: an array has another shape, or a layer's weights are another layer's, or were
        packed with another layout version, or not exactly. The module is then left as it was.
    """
    state = nnx.state(module)
    with ocp.StandardCheckpointer() as checkpointer:
        saved = checkpointer.metadata(os.path.abspath(path)).item_metadata
        _check_shapes(saved.tree, state)
        # Not strict: arrays are cut, or filled up with zeros, to the shapes of the module.
        restored = checkpointer.restore(
            os.path.abspath(path), nnx.to_pure_dict(state), strict=False
        )
    graphdef = nnx.graphdef(module)
    nnx.replace_by_pure_dict(state, restored)
    for _, part in nnx.iter_graph(nnx.merge(graphdef, state)):
        if isinstance(part, FusedMoE):
            part.check_restored()
    nnx.update(module, state)


def _check_shapes(saved: Any, state: nnx.State) -> None:
    """Only packed weights may be cut or filled up; ``check_restored`` sees to those."""
    for path, variable in nnx.to_flat_state(state):
        if not isinstance(variable, PackedWeight):
            found: Any = functools.reduce(lambda tree, key: tree[str(key)], path, saved)
            own = variable.get_value()
            if tuple(found.shape) != own.shape:
                raise ValueError(
                    f"{'.'.join(map(str, path))}: shape {tuple(found.shape)} in the checkpoint,"
                    f" {own.shape} in the module; make the module of the checkpoint's sizes."
                )
