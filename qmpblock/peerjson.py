"""JSON from a peer that is not trusted: bounded, and nothing in it that no peer of ours says.

Pure. A monitor, a lock in it or a file beside an image may say anything. What is read here has
at most a known size, number of values and depth, so that neither memory nor the stack runs out;
no number is outside 64 bits, infinite or none; no text has a NUL, which no path may have, or
half a surrogate pair, which nothing can print. QEMU sends none of these. So whoever goes on with
it need think of wrong types only.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any, Never

__all__ = ["MOST_BYTES", "MOST_LEVELS", "MOST_VALUES", "RefusedError", "read_json"]

#: Bytes of one text. Measured: a VM with 500 disks of two layers says 1.8 MB, one
#: chain of 150 layers 0.3 MB.
MOST_BYTES = 16 << 20
#: Values, keys not counted, each of which costs up to 250 bytes. Those 500 disks have 88,000.
MOST_VALUES = 1_000_000
#: Objects and lists inside each other; query-blockstats nests by the depth of a chain.
MOST_LEVELS = 600

_SHORT = 19  # digits that may not fit into 64 bits any more
_DIGITS_ALIKE = bytes(ord("0") if chr(byte).isdigit() else byte for byte in range(128)) + bytes(
    range(128, 256)
)


class RefusedError(ValueError):
    """It is no JSON, or more or something else than any peer of ours has to say; says why."""


def read_json(data: bytes) -> Any:
    """Read JSON.

    :param data: UTF-8.
    :raise RefusedError: it is refused.
    """
    if len(data) > MOST_BYTES:
        raise RefusedError(f"it has more than {MOST_BYTES} bytes")
    # What is short need not be counted.
    if len(data) > MOST_VALUES and sum(map(data.count, (b"{", b"[", b","))) > MOST_VALUES:
        raise RefusedError(f"it has more than {MOST_VALUES} values")
    # Called for each number they cost as much again as all the rest: only where it may matter.
    many_digits = b"0" * _SHORT in data.translate(_DIGITS_ALIKE)
    decoder = _CAREFUL if many_digits else _QUICK
    try:
        document = decoder.decode(data.decode("utf-8"))
    except RecursionError:
        raise _too_deep() from None
    except json.JSONDecodeError as error:
        raise RefusedError(f"it is no JSON: {error.msg} at {error.pos}") from None
    except UnicodeDecodeError:
        raise RefusedError("it is not UTF-8") from None
    if len(data) > MOST_LEVELS:
        _check_depth(document)
    if b"\\" in data and b"\\u" in data:  # the first alone is found much faster
        for text in _texts(document):
            _check_text(text)
    return document


def _too_deep() -> RefusedError:
    return RefusedError(f"it is nested more than {MOST_LEVELS} levels deep")


def _check_depth(document: Any) -> None:
    level = [document] if isinstance(document, dict | list) else []
    for _ in range(MOST_LEVELS):
        level = [
            one
            for item in level
            for one in (item.values() if type(item) is dict else item)
            if type(one) is dict or type(one) is list
        ]
        if not level:
            return
    raise _too_deep()


def _texts(document: Any) -> Iterator[str]:
    todo = [document]
    while todo:
        item = todo.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, list):
            todo += item
        elif isinstance(item, dict):
            todo += item.values()
            yield from item


def _check_text(text: str) -> None:
    if "\0" in text:
        raise RefusedError("a text in it has a NUL")
    if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
        raise RefusedError("a text in it has half a surrogate pair")


def _constant(text: str) -> Never:
    raise RefusedError(f"it has the number {text}")


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise RefusedError("it has a number that is too large")
    return value


def _int(text: str) -> int:
    value = int(text) if len(text) <= _SHORT + 2 else None
    if value is None or not -(1 << 63) <= value < 1 << 64:
        raise RefusedError("it has a number of more than 64 bits")
    return value


_QUICK = json.JSONDecoder(parse_constant=_constant, parse_float=_float)
_CAREFUL = json.JSONDecoder(parse_constant=_constant, parse_float=_float, parse_int=_int)
