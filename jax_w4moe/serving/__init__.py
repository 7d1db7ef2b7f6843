"""Serving a model: continuous batching over HTTP. Needs the extra ``serve``."""

from jax_w4moe.serving.engine import Engine
from jax_w4moe.serving.metrics import Metrics, compilations
from jax_w4moe.serving.requests import Closed, Generation, Refused, Request
from jax_w4moe.serving.server import load, serve
from jax_w4moe.serving.steps import Steps

__all__ = [
    "Closed",
    "Engine",
    "Generation",
    "Metrics",
    "Refused",
    "Request",
    "Steps",
    "compilations",
    "load",
    "serve",
]
