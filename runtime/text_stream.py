"""Text of tokens that come one by one, in pieces that are whole characters."""

from __future__ import annotations

from collections.abc import Sequence

from .tokenizer import TokenizerLike


class TextStream:
    """What follows a prompt: a token whose text is part of a character waits for the rest of it."""

    def __init__(self, tokenizer: TokenizerLike, prompt: Sequence[int]) -> None:
        self._tokenizer, self._ids = tokenizer, list(prompt)
        self._start, self._shown = tokenizer.decode(prompt), 0

    def push(self, token: int) -> str:
        """The text that this token completes, which may be empty."""
        self._ids.append(token)
        text = self._text()
        return "" if text.endswith("\ufffd") else self._new(text)

    def end(self) -> str:
        """What still waits when no token follows."""
        return self._new(self._text())

    def _text(self) -> str:
        return self._tokenizer.decode(self._ids).removeprefix(self._start)

    def _new(self, text: str) -> str:
        new = text[self._shown :]
        self._shown = max(self._shown, len(text))
        return new
