"""The body of a completion request, OpenAI style, and what it says."""

import dataclasses
import secrets
from typing import Any

from jax_w4moe.serving.requests import Request
from jax_w4moe.serving.text import Text

# Fields that other servers know, and the values at which they ask for nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "logprobs": (0, False),
    "stop": ([], ""),
    "suffix": ("",),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
}
_KINDS: dict[str, tuple[type, ...]] = {
    "model": (str,),
    "prompt": (str, list),
    "max_tokens": (int,),
    "temperature": (int, float),
    "top_p": (int, float),
    "seed": (int,),
    "stop_token_ids": (list,),
    "ignore_eos": (bool,),
    "stream": (bool,),
    "stream_options": (dict,),
    "user": (str,),
}


@dataclasses.dataclass(frozen=True)
class Parameters:
    """A body that was understood.

    Attributes:
      request: for the engine.
      model: the name asked for, or None.
      stream: whether tokens are to be sent as they come.
      include_usage: whether a stream is to end with the numbers of tokens.
    """

    request: Request
    model: str | None
    stream: bool
    include_usage: bool


def parse(body: Any, text: Text) -> Parameters:
    """Reads a body.

    Args:
      body: as it came from JSON.
      text: the tokenizer.

    Returns:
      What it asks for; a seed is drawn where it names none.

    Raises:
      ValueError: it is not understood, or asks for something that does not exist here.
    """
    if not isinstance(body, dict):
        raise ValueError("The body is no JSON object; send one with a prompt.")
    given = {name: value for name, value in body.items() if value is not None}
    for name, value in given.items():
        if name in _NEUTRAL:
            if value not in _NEUTRAL[name]:
                raise ValueError(f"{name}={value!r} is not supported; leave it out.")
        elif name not in _KINDS:
            raise ValueError(f"{name!r} is unknown; leave it out.")
        elif not _is(value, _KINDS[name]):
            kinds = " or ".join(kind.__name__ for kind in _KINDS[name])
            raise ValueError(f"{name}: got {type(value).__name__}, need {kinds}.")
    if "prompt" not in given:
        raise ValueError("prompt: it is missing; pass text or a list of token ids.")
    prompt = given["prompt"]
    request = Request(
        prompt=text.encode(prompt) if isinstance(prompt, str) else _ids("prompt", prompt),
        max_tokens=given.get("max_tokens", 16),
        temperature=float(given.get("temperature", 1.0)),
        top_p=float(given.get("top_p", 1.0)),
        seed=given.get("seed", secrets.randbits(32)),
        stop_token_ids=_ids("stop_token_ids", given.get("stop_token_ids", [])),
        ignore_eos=given.get("ignore_eos", False),
    )
    options = given.get("stream_options", {})
    return Parameters(
        request=request,
        model=given.get("model"),
        stream=given.get("stream", False),
        include_usage=bool(options.get("include_usage", False)),
    )


def _ids(name: str, value: list[Any]) -> tuple[int, ...]:
    if not all(_is(token, (int,)) for token in value):
        raise ValueError(f"{name}: it holds something that is no integer; pass token ids of one.")
    return tuple(value)


def _is(value: Any, kinds: tuple[type, ...]) -> bool:
    # True is an int to Python, but no number to a caller.
    return isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))
