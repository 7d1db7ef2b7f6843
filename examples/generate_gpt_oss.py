"""Text from a gpt-oss checkpoint, token by token.

    python examples/generate_gpt_oss.py /models/gpt-oss-20b --prompt "Why is the sky blue?"
    python examples/generate_gpt_oss.py /models/gpt-oss-120b --tensor-parallel 2 --temperature 0.7
    python examples/generate_gpt_oss.py  # a tiny random model, written for it

With a tokenizer.json in the folder prompts are text (pip install tokenizers), else token ids. The
prompt is taken as it is: for a chat pass it in the model's own format.
"""

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import typer

from jax_w4moe.models import TINY_GPT_OSS, GptOss, Runner, save_random_gpt_oss, spread_over

PROMPT_MULTIPLE = 64  # prompts are padded to it, so that few sizes are compiled
ACTIVATIONS = {"fp8": jnp.float8_e4m3fn, "bf16": jnp.bfloat16}


def main(
    path: Annotated[Path | None, typer.Argument(help="The model's folder.")] = None,
    prompt: Annotated[str, typer.Option(help="Text, or token ids.")] = "",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate.")] = 32,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    expert_parallel: Annotated[
        int, typer.Option(min=1, help="Devices to spread experts over.")
    ] = 1,
    tensor_parallel: Annotated[int, typer.Option(min=1, help="Devices to slice them over.")] = 1,
    activations: Annotated[str, typer.Option(help="fp8 or bf16.")] = "fp8",
) -> None:
    """Continues a prompt, and prints tokens per second."""
    if activations not in ACTIVATIONS:
        raise typer.BadParameter(f"activations={activations!r}, need fp8 or bf16.")
    with contextlib.ExitStack() as stack:
        if path is None:
            path = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            save_random_gpt_oss(path, TINY_GPT_OSS)
            print("A tiny model of random weights; pass a folder for a real one.")
        tokens, text_of = read_prompt(path, prompt)
        try:
            spread = spread_over(expert_parallel, tensor_parallel)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error
        began = time.perf_counter()
        model = GptOss.from_pretrained(
            path,
            act_dtype=ACTIVATIONS[activations],
            **spread,
        )
        jax.block_until_ready(jax.tree.leaves(model))
        print(f"Loaded in {time.perf_counter() - began:.1f} s.")
    generate(Runner(model), tokens, max_new_tokens, temperature, seed, text_of)


def read_prompt(path: Path, prompt: str) -> tuple[list[int], Callable[[int], str | None]]:
    """The prompt's token ids, and what turns one token after the other into text."""
    file = path / "tokenizer.json"
    if file.exists():
        import tokenizers  # pip install tokenizers

        tokenizer = tokenizers.Tokenizer.from_file(str(file))
        stream = tokenizers.decoders.DecodeStream(skip_special_tokens=False)
        ids = tokenizer.encode(prompt or "Hello", add_special_tokens=False).ids
        return ids, lambda token: stream.step(tokenizer, token)
    try:
        ids = [int(word) for word in prompt.split()] or [1, 2, 3]
    except ValueError:
        raise typer.BadParameter(
            f"prompt={prompt!r} is text, but {path} has no tokenizer.json; pass token ids."
        ) from None
    return ids, lambda token: f"{token} "


def generate(
    runner: Runner,
    prompt: list[int],
    max_new_tokens: int,
    temperature: float,
    seed: int,
    text_of: Callable[[int], str | None],
) -> None:
    """Prints what follows a prompt, as it comes, and how fast it came."""
    config = runner.model.config
    longest = config.max_position_embeddings
    if len(prompt) + max_new_tokens > longest:
        raise typer.BadParameter(
            f"{len(prompt)} tokens and {max_new_tokens} new ones are more than the model's"
            f" {longest}; pass fewer."
        )
    size = min(-(-len(prompt) // PROMPT_MULTIPLE) * PROMPT_MULTIPLE, longest)
    capacity = max(size, len(prompt) + max_new_tokens)
    padded = np.zeros((1, size), np.int32)
    padded[0, : len(prompt)] = prompt
    lengths = np.array([len(prompt)], np.int32)

    @jax.jit
    def sample(logits: jax.Array, key: jax.Array) -> jax.Array:
        if temperature == 0:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return jax.random.categorical(key, logits / temperature).astype(jnp.int32)

    def tokens() -> Iterator[tuple[int, float]]:
        """New tokens and the seconds that each took."""
        keys = jax.random.split(jax.random.key(seed), max_new_tokens)
        began = time.perf_counter()
        logits, cache = runner.prefill(runner.init_cache(1, capacity), padded, lengths)
        for key in keys:
            token = sample(logits, key)
            number = int(token[0])
            yield number, time.perf_counter() - began
            began = time.perf_counter()
            logits, cache = runner.decode(cache, token)

    warm_up = tokens()  # compiles
    for _ in range(2):
        next(warm_up, None)
    seconds: list[float] = []
    for token, taken in tokens():
        seconds.append(taken)
        if token in config.eos_token_ids:
            break
        print(text_of(token) or "", end="", flush=True)
    print(f"\nPrefill: {len(prompt)} tokens, {len(prompt) / seconds[0]:.0f} tokens/s.")
    if steps := seconds[1:]:
        print(f"Decode: {len(steps)} tokens, {len(steps) / sum(steps):.1f} tokens/s.")


if __name__ == "__main__":
    typer.run(main)
