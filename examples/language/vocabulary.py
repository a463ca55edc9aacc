"""Conversion of text to tokens, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from sashimi.problems import Problem


class Vocabulary(Protocol):
    """Converts text to tokens, and back."""

    def encode(self, text: str) -> list[int]:
        """The tokens of a text."""
        ...

    def decode(self, tokens: list[int]) -> str:
        """The text of tokens."""
        ...


class Bytes:
    """Bytes of UTF-8 as 256 tokens."""

    def encode(self, text: str) -> list[int]:
        """See :class:`Vocabulary`."""
        return list(text.encode())

    def decode(self, tokens: list[int]) -> str:
        """See :class:`Vocabulary`; bytes that are not valid UTF-8 become replacement characters."""
        return bytes(tokens).decode(errors="replace")


class Numbers:
    """Token numbers, separated by spaces, instead of text."""

    def encode(self, text: str) -> list[int]:
        """See :class:`Vocabulary`.

        Raises:
            Problem: If the text has something else than numbers.
        """
        try:
            return [int(word) for word in text.split()]
        except ValueError as error:
            raise Problem(f"with --numbers a prompt must be numbers separated by spaces, not {text!r}.") from error

    def decode(self, tokens: list[int]) -> str:
        """See :class:`Vocabulary`."""
        return "".join(f"{token} " for token in tokens)


class TokenizerFile:
    """A `tokenizer.json`, as in the folders of public models. Needs the package `tokenizers`."""

    def __init__(self, path: Path) -> None:
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise Problem(
                "a tokenizer.json needs the package tokenizers: pip install tokenizers; or give --numbers."
            ) from error
        try:
            self.tokenizer: Any = Tokenizer.from_file(str(path))
        except Exception as error:  # it raises no narrower class
            raise Problem(f"{path} cannot be read as a tokenizer ({error}).") from error

    def encode(self, text: str) -> list[int]:
        """See :class:`Vocabulary`."""
        return list(self.tokenizer.encode(text).ids)

    def decode(self, tokens: list[int]) -> str:
        """See :class:`Vocabulary`; special tokens are kept."""
        return str(self.tokenizer.decode(tokens, skip_special_tokens=False))


def vocabulary(folder: Path, tokens: int, tokenizer: Path | None = None, numbers: bool = False) -> Vocabulary:
    """The vocabulary of a model.

    Arguments:
        folder: The folder of the model.
        tokens: The number of tokens of the model.
        tokenizer: A tokenizer file, by default `tokenizer.json` in that folder.
        numbers: Use token numbers instead of text.

    Raises:
        Problem: If there is no tokenizer file and the model is not one of bytes.
    """
    if numbers:
        return Numbers()
    path = tokenizer or folder / "tokenizer.json"
    if tokenizer is not None or path.is_file():
        return TokenizerFile(path)
    if tokens == 256:
        return Bytes()
    raise Problem(f"{folder} has no tokenizer.json; give --tokenizer FILE, or --numbers.")


class Writer:
    """Decodes tokens that arrive in parts, and returns each part of the text as soon as it is complete."""

    def __init__(self, words: Vocabulary) -> None:
        self.words = words
        self.tokens: list[int] = []
        self.written = 0

    def add(self, tokens: list[int], *, last: bool = False) -> str:
        """The new text after these tokens. An incomplete character is kept back until its other tokens arrive."""
        self.tokens += tokens
        text = self.words.decode(self.tokens)
        complete = text if last else text.rstrip("\ufffd")
        new, self.written = complete[self.written :], len(complete)
        return new
