"""A small model, its steps, and what each request is to answer, by Runner alone."""

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jax_w4moe.models import GptOss, Runner, save_random_gpt_oss
from jax_w4moe.serving import Engine, Request, Steps
from tests.models.common import config

SLOTS, CAPACITY, LENGTHS = 4, 24, (4, 8, 16)
CONFIG = config(eos_token_ids=(7,), sliding_window=6, num_local_experts=8)
EXACT = {"dtype": jnp.float32, "act_dtype": jnp.float32}
LIMIT_S = 60.0  # no test waits longer


def make_model(folder: Path, **options: Any) -> GptOss:
    save_random_gpt_oss(folder, CONFIG, seed=5)
    return GptOss.from_pretrained(folder, **(EXACT | options))


def make_steps(model: GptOss) -> Steps:
    steps = Steps(model, slots=SLOTS, capacity=CAPACITY, prompt_lengths=LENGTHS, prefill_tokens=16)
    steps.warm_up()
    return steps


class Offline:
    """Greedy answers, one request at a time."""

    def __init__(self, model: GptOss, padded: int = max(LENGTHS)) -> None:
        self.runner = Runner(model)
        self.padded = padded
        self.eos = model.config.eos_token_ids

    def answer(self, request: Request) -> tuple[list[int], str]:
        """(tokens, finish reason) as the engine is to give them."""
        length = len(request.prompt)
        prompt = np.zeros((1, self.padded), np.int32)
        prompt[0, :length] = request.prompt
        cache = self.runner.init_cache(SLOTS, CAPACITY)
        one = np.zeros(1, np.int32)
        logits, cache = self.runner.prefill(cache, prompt, one + np.int32(length), one)
        tokens: list[int] = []
        active = np.arange(SLOTS) == 0
        while not np.isnan(logits[0, 0]):  # a full row
            token = int(jnp.argmax(logits[0]))
            if token in request.stop_token_ids or (token in self.eos and not request.ignore_eos):
                return tokens, "stop"
            tokens.append(token)
            if len(tokens) == request.max_tokens:
                break
            logits, cache = self.runner.decode(cache, np.full(SLOTS, token, np.int32), active)
        return tokens, "length"


def serve(engine: Engine, clients: Coroutine[Any, Any, Any]) -> Any:
    """Runs the clients beside the engine, closes it when they are done, and waits for it."""

    async def both() -> Any:
        running = asyncio.create_task(engine.run())
        try:
            return await clients
        finally:
            engine.close()
            await running

    return asyncio.run(asyncio.wait_for(both(), LIMIT_S))
