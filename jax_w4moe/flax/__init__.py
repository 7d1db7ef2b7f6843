"""Flax NNX modules holding packed 4-bit experts. Needs the ``flax`` extra."""

from jax_w4moe.flax.block import LatentProjection, MoEBlock, SharedExpert
from jax_w4moe.flax.layer import FusedMoE, PackedWeight
from jax_w4moe.flax.router import Router, RoutingBuffer
from jax_w4moe.flax.saving import restore, save

__all__ = [
    "FusedMoE",
    "LatentProjection",
    "MoEBlock",
    "PackedWeight",
    "Router",
    "RoutingBuffer",
    "SharedExpert",
    "restore",
    "save",
]
