"""From text to token ids and back, piece by piece."""

from pathlib import Path
from typing import Any


class Pieces:
    """The text of one answer as it grows; what is not yet a whole character waits."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._given = ""
        if tokenizer is not None:
            import tokenizers

            self._stream = tokenizers.decoders.DecodeStream(skip_special_tokens=False)

    def add(self, tokens: list[int]) -> str:
        """The text that these tokens add."""
        if self._tokenizer is None:
            piece = "".join(f" {token}" for token in tokens)
            piece = piece if self._given else piece[1:]
        else:
            steps = (self._stream.step(self._tokenizer, token) for token in tokens)
            piece = "".join(step or "" for step in steps)
        self._tokens += tokens
        self._given += piece
        return piece

    def rest(self) -> str:
        """What waited for a token that did not come."""
        if self._tokenizer is None:
            return ""
        whole = self._tokenizer.decode(self._tokens, skip_special_tokens=False)
        return whole.removeprefix(self._given) if whole.startswith(self._given) else ""


class Text:
    """A folder's tokenizer.json; without one, texts are token ids with spaces between them."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer: Any = None
        file = folder / "tokenizer.json"
        if file.exists():
            import tokenizers

            self._tokenizer = tokenizers.Tokenizer.from_file(str(file))

    def encode(self, prompt: str) -> tuple[int, ...]:
        """Token ids of a text, which is taken as it is.

        Raises:
          ValueError: there is no tokenizer, and this is not a list of numbers.
        """
        if self._tokenizer is not None:
            return tuple(self._tokenizer.encode(prompt, add_special_tokens=False).ids)
        try:
            return tuple(int(word) for word in prompt.split())
        except ValueError:
            raise ValueError(
                "prompt: it is text, but the model's folder has no tokenizer.json; pass token ids."
            ) from None

    def pieces(self) -> Pieces:
        """For the text of one answer."""
        return Pieces(self._tokenizer)
