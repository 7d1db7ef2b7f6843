"""``python -m jax_w4moe``: see :mod:`jax_w4moe.cli`."""

from jax_w4moe.cli import app

app(prog_name="jax_w4moe")
