"""Values of a policy's keys, of disks and copies alike. Each is refused with its place."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import TYPE_CHECKING

from qmpblock.errors import printable
from qmpblock.sizes import LARGEST, Amount, parse_size

if TYPE_CHECKING:
    from qmpblock.yamltext import Mapping

__all__ = ["amount_in", "filled_in", "keep_free_in", "number_in", "seconds_in", "speed_in"]

_PERCENT = re.compile(r"(\d{1,3}(?:\.\d{1,6})?)\s?%")
_SECONDS = re.compile(r"\d{1,9}(?:\.\d{1,6})?")
_WHOLE = re.compile(r"-?\d{1,9}")


def filled_in(entry: Mapping, key: str) -> str:
    """Return text that is not empty."""
    text = entry.text(key)
    if not text:
        entry.refuse(key, "is empty")
    return text


def number_in(entry: Mapping, key: str, default: int) -> int:
    """Return a whole number."""
    text = entry.text(key, str(default))
    if not _WHOLE.fullmatch(text):
        entry.refuse(key, f"{printable(text)!r} is not a whole number")
    return int(text)


def seconds_in(entry: Mapping, key: str) -> float:
    """Return seconds, more than none; 0 where nothing is said."""
    if key not in entry:
        return 0.0
    text = entry.text(key)
    if not _SECONDS.fullmatch(text) or not float(text):
        entry.refuse(key, f"{printable(text)!r} is no number of seconds, more than 0")
    return float(text)


def speed_in(entry: Mapping, default: int) -> int:
    """Return bytes a second."""
    speed = entry.size("speed", default)
    if speed > LARGEST:
        entry.refuse("speed", "is more than 2^63 - 1 bytes a second")
    return speed


def keep_free_in(entry: Mapping, default: Amount | None) -> Amount | None:
    """Return what must stay free on the host."""
    return amount_in(entry, "keep_free") if "keep_free" in entry else default


def amount_in(entry: Mapping, key: str) -> Amount:
    """Return a size, or a share."""
    text = entry.text(key)
    share = _PERCENT.fullmatch(text)
    if share is not None:
        percent = Fraction(share[1])
        if percent > 100:
            entry.refuse(key, f"{printable(text)!r} is more than the whole")
        return Amount(percent=percent)
    size = parse_size(text)
    if size is None or size > LARGEST:
        entry.refuse(key, f"{printable(text)!r} is neither a size such as 64K or 1G, nor a percent")
    return Amount(size)
