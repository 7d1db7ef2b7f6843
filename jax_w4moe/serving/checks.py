"""Preconditions of the server, and the one sentence of each."""

import math
from collections.abc import Sequence

from jax_w4moe.serving.requests import Request


def sizes(slots: int, capacity: int, prompt_lengths: Sequence[int], prefill_tokens: int) -> None:
    """Of ``Steps``; the model checks the capacity."""
    for name, value in (
        ("slots", slots),
        ("capacity", capacity),
        ("prompt_lengths", prompt_lengths[0]),
        ("prefill_tokens", prefill_tokens),
    ):
        if value < 1:
            raise ValueError(f"{name}={value} is below 1; pass a positive number.")
    if prompt_lengths[-1] > capacity:
        raise ValueError(
            f"prompt_lengths: {prompt_lengths[-1]} is more than capacity={capacity}, what a slot"
            " can hold; leave it out or raise the capacity."
        )


def max_queue(value: int) -> None:
    """Of ``Engine``."""
    if value < 1:
        raise ValueError(f"max_queue={value} is below 1; a request waits there for its first step.")


def request(value: Request, vocab_size: int, longest_prompt: int) -> None:
    """Of ``submit``."""
    if not value.prompt:
        raise ValueError("prompt: it has no token; pass at least one.")
    if len(value.prompt) > longest_prompt:
        raise ValueError(
            f"prompt: {len(value.prompt)} tokens are more than this server's {longest_prompt};"
            " shorten it."
        )
    for name, ids in (("prompt", value.prompt), ("stop_token_ids", value.stop_token_ids)):
        least, largest = min(ids, default=0), max(ids, default=0)
        if least < 0 or largest >= vocab_size:
            raise ValueError(
                f"{name}: token id {least if least < 0 else largest} is not in"
                f" 0..{vocab_size - 1}; use the model's own tokenizer."
            )
    if value.max_tokens < 1:
        raise ValueError(f"max_tokens={value.max_tokens} is below 1; ask for at least one token.")
    if not (math.isfinite(value.temperature) and value.temperature >= 0):
        raise ValueError(
            f"temperature={value.temperature} is not a number from 0 on; 0 takes the likeliest"
            " token."
        )
    if not 0 < value.top_p <= 1:
        raise ValueError(f"top_p={value.top_p} is not in (0, 1]; 1 draws among all tokens.")
    if not 0 <= value.seed < 2**32:
        raise ValueError(f"seed={value.seed} is not in 0..{2**32 - 1}; take one that is.")
