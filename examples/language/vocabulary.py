"""Text as tokens, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from sashimi.problems import Problem


class Vocabulary(Protocol):
    """What turns text into tokens."""

    def encode(self, text: str) -> list[int]:
        """The tokens of a text."""
        ...

    def decode(self, tokens: list[int]) -> str:
        """The text of tokens."""
        ...


class Bytes:
    """256 tokens: the bytes of UTF-8."""

    def encode(self, text: str) -> list[int]:
        """See :class:`Vocabulary`."""
        return list(text.encode())

    def decode(self, tokens: list[int]) -> str:
        """See :class:`Vocabulary`; what is no UTF-8 becomes a replacement character."""
        return bytes(tokens).decode(errors="replace")


class Numbers:
    """Tokens as they are: numbers with spaces between them."""

    def encode(self, text: str) -> list[int]:
        """See :class:`Vocabulary`.

        Raises:
            Problem: If it is not numbers.
        """
        try:
            return [int(word) for word in text.split()]
        except ValueError as error:
            raise Problem(f"with --numbers a prompt is token numbers with spaces between, not {text!r}.") from error

    def decode(self, tokens: list[int]) -> str:
        """See :class:`Vocabulary`."""
        return "".join(f"{token} " for token in tokens)


class TokenizerFile:
    """A `tokenizer.json`, as it lies beside public models. Needs the package `tokenizers`."""

    def __init__(self, path: Path) -> None:
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise Problem("to read text with a tokenizer.json: pip install tokenizers; or give --numbers.") from error
        try:
            self.tokenizer: Any = Tokenizer.from_file(str(path))
        except Exception as error:  # it raises nothing more special
            raise Problem(f"{path} cannot be read as a tokenizer ({error}).") from error

    def encode(self, text: str) -> list[int]:
        """See :class:`Vocabulary`."""
        return list(self.tokenizer.encode(text).ids)

    def decode(self, tokens: list[int]) -> str:
        """See :class:`Vocabulary`; special tokens are shown."""
        return str(self.tokenizer.decode(tokens, skip_special_tokens=False))


def vocabulary(folder: Path, tokens: int, tokenizer: Path | None = None, numbers: bool = False) -> Vocabulary:
    """The vocabulary of a model.

    Arguments:
        folder: Of the model.
        tokens: How many the model has.
        tokenizer: A tokenizer file, by default `tokenizer.json` of that folder.
        numbers: Take numbers instead of text.

    Raises:
        Problem: If none is known.
    """
    if numbers:
        return Numbers()
    path = tokenizer or folder / "tokenizer.json"
    if tokenizer is not None or path.is_file():
        return TokenizerFile(path)
    if tokens == 256:
        return Bytes()
    raise Problem(f"{folder} has no tokenizer.json; give --tokenizer FILE, or --numbers for token numbers.")


class Writer:
    """Text of tokens that come in parts: each part of the text is given out once it cannot change any more."""

    def __init__(self, words: Vocabulary) -> None:
        self.words = words
        self.tokens: list[int] = []
        self.written = 0

    def add(self, tokens: list[int], *, last: bool = False) -> str:
        """The text that is new with these tokens; a character that is not complete waits for the rest of it."""
        self.tokens += tokens
        text = self.words.decode(self.tokens)
        complete = text if last else text.rstrip("\ufffd")
        new, self.written = complete[self.written :], len(complete)
        return new
