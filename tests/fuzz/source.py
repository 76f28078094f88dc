"""Turns the bytes of a fuzzer into decisions, and documents into ones that are a little wrong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

T = TypeVar("T")

_TEXTS = ("", "x", "\0", "\ud800", "\u202ex", "../x", "file:x", "json:{}", "10", "a" * 300)
_NUMBERS = (0, 1, -1, 511, 1 << 31, 1 << 32, (1 << 63) - 1, 1 << 63, 1 << 64, 1 << 200)
_ODD = (None, True, False, 1.5, float("inf"), float("nan"), [], {}, [[]], [{}], [None])


class Source:
    """Decisions, read from bytes one after the other; zeros once those are used up."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def left(self) -> int:
        """How many bytes are unread."""
        return max(0, len(self._data) - self._at)

    def byte(self) -> int:
        """Return a number from 0 to 255."""
        self._at += 1
        return self._data[self._at - 1] if self._at <= len(self._data) else 0

    def bytes(self, length: int) -> bytes:
        """Return at most `length` bytes."""
        self._at += length
        return self._data[self._at - length : self._at]

    def pick(self, choices: Sequence[T]) -> T:
        """Return one of at most 65536 choices."""
        number = self.byte()
        if len(choices) > 256:
            number = number << 8 | self.byte()
        return choices[number % len(choices)]

    def number(self) -> int:
        """Return a number, often one at the edge of something, often a small one."""
        kind = self.byte()
        if kind < 64:
            return self.pick(_NUMBERS) + kind % 3 - 1
        return int.from_bytes(self.bytes(1 + kind % 8))

    def unsigned(self, bits: int) -> int:
        """Return a number that fits into so many bits."""
        return self.number() & ((1 << bits) - 1)


def disturbed(document: Any, source: Source, words: Sequence[str]) -> Any:
    """Return a document of JSON values with up to 8 things in it changed; it stays as it is.

    :param words: texts that are likely to mean something in it.
    """
    for _ in range(1 + source.byte() % 8):
        document = _change(document, source, words)
        if not source.left:
            break
    return document


def words_of(document: Any) -> list[str]:
    """Return the texts that stand in a document."""
    if isinstance(document, dict):
        return sorted({word for value in document.values() for word in words_of(value)})
    if isinstance(document, list):
        return sorted({word for value in document for word in words_of(value)})
    return [document] if isinstance(document, str) else []


def _change(value: Any, source: Source, words: Sequence[str]) -> Any:
    """Copy what lies on the way to the change, and nothing else."""
    what = source.byte()
    if what < 200 and value and isinstance(value, dict | list):
        copy = value.copy()
        key = source.pick(list(copy) if isinstance(copy, dict) else range(len(copy)))
        if what < 170:
            copy[key] = _change(copy[key], source, words)
        elif what < 180:
            del copy[key]
        elif isinstance(copy, dict):
            copy[source.pick(words or _TEXTS)] = copy[key]
        else:
            copy.append(copy[key])
        return copy
    return _odd(source, words)


def _odd(source: Source, words: Sequence[str]) -> Any:
    kind = source.byte() % 8
    if kind < 3 and words:
        return source.pick(words)
    if kind == 4:
        return source.pick(_TEXTS)
    if kind == 5:
        return source.number()
    if kind == 6:
        return source.bytes(source.byte() % 32).decode("latin-1")
    return source.pick(_ODD)
