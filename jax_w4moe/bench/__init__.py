"""``python -m jax_w4moe bench``: an MoE layer's time beside its floor and other libraries' times.

``shapes`` names the layers, ``layers`` makes weights and routings, ``sweep`` times them, ``peers``
holds what others were measured at, ``report`` and ``plot`` show it, ``machine`` says where it ran;
``stack`` and ``host`` are measurements of their own.
"""
