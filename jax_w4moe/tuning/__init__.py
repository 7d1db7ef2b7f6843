"""Which tactic (today: which tile) a kernel runs with; ``docs/tuning.md`` says how it is chosen.

``problem`` names what is chosen and for what, ``model`` estimates times, ``winners`` reads and
writes measured ones, ``choice`` decides, ``recording`` measures. The choice is made in Python at
trace time from static shapes, so it is the same on every host; it changes no bit of a result.
"""

from jax_w4moe.tuning.choice import Choice, choose, load_tactics
from jax_w4moe.tuning.problem import Problem, Tactic, check, tactics
from jax_w4moe.tuning.recording import autotune, record, wanted

__all__ = [
    "Choice",
    "Problem",
    "Tactic",
    "autotune",
    "check",
    "choose",
    "load_tactics",
    "record",
    "tactics",
    "wanted",
]
