"""Operations: one line of a scenario each, such as `write 1M 64K 0xaa every 2M times 3`."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, NoReturn, cast

from qmpblock.testing._yaml import Mapping, parse_size

__all__ = ["Operation", "Verb", "read_operations"]

Verb = Literal["write", "zero", "discard", "compress", "fallocate", "snapshot", "flush"]


@dataclass(frozen=True, slots=True)
class Operation:
    """One thing done to an image (when it is made) or by the guest (later).

    :param offset: bytes; also `length`. Both 0 for `snapshot` and `flush`.
    :param pattern: the byte that is written, for `write` and `compress`.
    :param unmap: for `zero`: the range may be deallocated.
    :param name: of the internal snapshot.
    """

    verb: Verb
    offset: int = 0
    length: int = 0
    pattern: int = 0
    unmap: bool = False
    name: str = ""

    @property
    def end(self) -> int:
        """The first byte after the range."""
        return self.offset + self.length


_OPERATION = re.compile(
    r"(?P<verb>write|compress|zero|discard|fallocate)\s+(?P<offset>\S+)\s+(?P<length>\S+)"
    r"(?:\s+(?P<pattern>0x[0-9a-fA-F]{1,2}|[A-Z]))?(?P<unmap>\s+unmap)?"
    r"(?:\s+every\s+(?P<step>\S+)\s+times\s+(?P<times>\d+))?"
)
_MAX_TIMES = 100_000

_Refuse = Callable[[str], NoReturn]


def read_operations(
    entry: Mapping, key: str, verbs: tuple[str, ...], size: int
) -> tuple[Operation, ...]:
    """Read the list of operations under `key`; empty if it is not there.

    :param verbs: those that may stand here.
    :param size: bytes that no operation may exceed.
    :raise ScenarioError: one of them is wrong.
    """
    operations: list[Operation] = []
    for text, refuse in entry.lines(key):
        words = text.split()
        if not words or words[0] not in verbs:
            refuse(f"must begin with one of {', '.join(verbs)}")
        if words[0] == "flush" and len(words) == 1:
            operations.append(Operation("flush"))
        elif words[0] == "snapshot" and len(words) == 2:
            operations.append(Operation("snapshot", name=words[1]))
        else:
            operations += _on_ranges(text.strip(), size, refuse)
    return tuple(operations)


def _on_ranges(text: str, size: int, refuse: _Refuse) -> list[Operation]:
    """Read a line that names a range, and how often it is repeated."""
    match = _OPERATION.fullmatch(text)
    if match is None:
        refuse("is not VERB OFFSET LENGTH [PATTERN] [unmap] [every STEP times N]")
    offset, length, step = (_bytes(match[group], refuse) for group in ("offset", "length", "step"))
    first = Operation(
        cast(Verb, match["verb"]),
        offset,
        length,
        _pattern(match, refuse),
        unmap=match["unmap"] is not None,
    )
    if first.unmap and first.verb != "zero":
        refuse("unmap goes with zero")
    times = int(match["times"] or 1)
    last = first.end + step * (times - 1)
    if length == 0 or not 1 <= times <= _MAX_TIMES or last > size:
        refuse(f"must stay inside the {size} bytes of the image (at most {_MAX_TIMES} times)")
    return [replace(first, offset=offset + step * index) for index in range(times)]


def _bytes(text: str | None, refuse: _Refuse) -> int:
    """Read a number of bytes; what is not there is 0."""
    value = parse_size(text or "0")
    if value is None:
        refuse(f"{text!r} is not a size")
    return value


def _pattern(match: re.Match[str], refuse: _Refuse) -> int:
    """Return the byte that is written; 0 where none is."""
    text = match["pattern"]
    if (match["verb"] in ("write", "compress")) != (text is not None):
        refuse("write and compress, and only they, need a pattern (0x00 to 0xff, or a letter)")
    if text is None:
        return 0
    return int(text, 16) if text.startswith("0x") else ord(text)
