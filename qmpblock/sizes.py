"""Sizes: numbers of bytes as people write them, by qemu-img's suffixes: read, and written. Pure.

One grammar for options, policies, scenarios and output: `65536`, `64K`, `1.5G`, `0x10000`, and a
sum of such (`1M+512`). K, M, G, T, P and E, in either case, are powers of 1024; B is a byte.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qmpblock.errors import RangeError

if TYPE_CHECKING:
    from fractions import Fraction

__all__ = ["LARGEST", "UNITS", "Amount", "check_range", "human_size", "parse_size"]

LARGEST = (1 << 63) - 1  #: bytes, of anything in QEMU (int64_t)
UNITS = {unit: 1 << 10 * power for power, unit in enumerate("BKMGTPE")}

_LETTERS = "".join(UNITS)[1:]
_TERM = re.compile(r"0x([0-9a-f]+)|(\d+(?:\.\d*)?|\.\d+)([BKMGTPE]?)", re.ASCII | re.IGNORECASE)
_LONGEST = 40  # characters of a term: Python reads no more than 4300 digits


def parse_size(text: str) -> int | None:
    """Read a number of bytes, rounded down to a whole one; None if it is none."""
    from fractions import Fraction  # it costs more than all else here

    total = Fraction(0)
    for term in text.split("+"):
        match = _TERM.fullmatch(term) if len(term) <= _LONGEST else None
        if match is None:
            return None
        if match[1]:
            total += int(match[1], 16)
        else:
            total += Fraction(match[2]) * UNITS[match[3].upper() or "B"]
    return int(total)


def check_range(size: int, offset: int, length: int | None) -> tuple[int, int]:
    """Return the range asked for, its length filled in.

    :raise RangeError: it is not inside a disk of `size` bytes.
    """
    if not 0 <= offset <= size:
        raise RangeError(f"offset {offset} is not inside the disk of {size} bytes")
    if length is None:
        length = size - offset
    if length < 0 or offset + length > size:
        raise RangeError(
            f"offset {offset} and length {length} reach to {offset + length}, "
            f"but the disk has {size} bytes"
        )
    return offset, length


def human_size(size: int) -> str:
    """Write a number of bytes in three digits or so, as it could be read: `512`, `64K`, `1.5G`."""
    unit = 0
    while unit < len(_LETTERS) and abs(size) >= 1024 ** (unit + 1):
        unit += 1
    if not unit:
        return str(size)
    whole, rest = divmod(size, 1024**unit)
    if not rest:
        return f"{whole}{_LETTERS[unit - 1]}"
    digits = max(0, 3 - len(str(abs(whole))))
    shown = f"{size / 1024**unit:.{digits}f}"
    return f"{shown.rstrip('0').rstrip('.') if digits else shown}{_LETTERS[unit - 1]}"


@dataclass(frozen=True)
class Amount:
    """Bytes, or a share of a whole.

    :ivar percent: of the whole; None where it is `bytes`.
    """

    bytes: int = 0
    percent: Fraction | None = None

    def of(self, whole: int) -> int:
        """Return the bytes that it is of `whole`, rounded down."""
        return self.bytes if self.percent is None else int(whole * self.percent / 100)

    def __str__(self) -> str:
        return str(self.bytes) if self.percent is None else f"{float(self.percent):g}%"
