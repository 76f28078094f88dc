"""Options of a block node as text: in a `json:` file name, or in a record of ours. Pure.

QEMU makes such a name where a plain one does not open the node as it is open::

    json:{"driver": "raw", "offset": "1M", "file": {"driver": "file", "filename": "/i/disk"}}

Numbers stand there as they were given: those of a legacy -drive as words (`as_bytes`). What is
too long QEMU cuts off, so that it is no JSON any more.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from qmpblock.sizes import UNITS

__all__ = ["as_bytes", "as_name", "as_text", "from_text", "innermost", "said_by"]

_PREFIX = "json:"
_NUMBER = re.compile(r"(0[xX][0-9a-fA-F]+)|(\d+)([bBkKmMgGtTpPeE]?)", re.ASCII)


def as_text(options: Mapping[str, Any]) -> str:
    """Return options as text, as a record keeps them."""
    return json.dumps(options)


def from_text(text: str) -> dict[str, Any]:
    """Return options from such text, or none where it is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def as_name(options: Mapping[str, Any]) -> str:
    """Return a file name by which QEMU and its tools open what the options describe."""
    return _PREFIX + as_text(options)


def said_by(name: str) -> dict[str, Any]:
    """Return the options in a file name; none where it is a plain one, or cut off."""
    return from_text(name.removeprefix(_PREFIX)) if name.startswith(_PREFIX) else {}


def innermost(options: Any) -> dict[str, Any]:
    """Return the options of the node at the end of the `file` edges; none where it has a name."""
    while isinstance(options, dict) and "file" in options:
        options = options["file"]
    return options if isinstance(options, dict) else {}


def as_bytes(value: Any) -> int:
    """Read a number of bytes as QEMU does; fractions apart, which are none.

    :raise ValueError: it is no such number.
    """
    if type(value) is int and value >= 0:
        return value
    match = _NUMBER.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise ValueError(f"{value!r} is no number of bytes")
    if match[1]:
        return int(match[1], 16)
    return int(match[2]) * UNITS[match[3].upper() or "B"]
