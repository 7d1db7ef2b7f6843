"""Other implementations of the layer, one module each, timed in the same run when asked for.

A module has ``prepare(experts: PackedExperts) -> weights``, which may convert the weights as it
likes, and ``run(weights, x, topk_ids, topk_weights) -> y`` on the arrays of ``fused_moe``. An
optional library is imported at the module's head: where it is missing, that is reported in a line.
"""

import importlib
from collections.abc import Callable, Sequence
from types import ModuleType

BACKENDS = {
    "ragged_dot": "jax_w4moe.bench.backends.ragged_dot",
    "tokamax": "jax_w4moe.bench.backends.tokamax",
}


def load(names: Sequence[str], report: Callable[[str], None]) -> dict[str, ModuleType]:
    """Imports the named backends; one that cannot be imported is reported and left out.

    Raises:
      ValueError: a name that is not in ``BACKENDS``.
    """
    loaded = {}
    for name in names:
        if name not in BACKENDS:
            raise ValueError(f"backend {name!r} is unknown; use one of {', '.join(BACKENDS)}.")
        try:
            loaded[name] = importlib.import_module(BACKENDS[name])
        except ImportError as error:
            report(f"Backend {name} is left out: {error}.")
    return loaded
