"""Lines of JSON that prove, by a key, who wrote them, all before them, and in this order.

Each line ends in the HMAC-SHA256 of its own text and of the line's before::

    {"format": 2, ..., "mac": "5f0c..."}
    {"made": "...", "mac": "91d2..."}

Whoever has no key can change none of them, leave none out, put them in another order, or take one
from another file. What they can take away is the end: so a file that is whole is to be believed
before one that is only proven.
"""

from __future__ import annotations

import hmac
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["lines_of", "proving", "sealed"]

_BEGIN = b"qmpblock journal\n"  # what the first line follows
_SEAL = re.compile(rb', "mac": "([0-9a-f]{64})"\}\n?\Z')


def sealed(key: bytes | None, before: bytes, data: Mapping[str, Any]) -> bytes:
    """Return the line that says these data, with its newline.

    :param key: None: it is to prove nothing.
    :param before: the lines that it follows.
    """
    text = json.dumps(data).encode()
    if key is None:
        return text + b"\n"
    return text[:-1] + b', "mac": "' + _mac(key, _last_mac(before), text) + b'"}\n'


def proving(keys: Iterable[bytes], lines: bytes) -> bytes | None:
    """Return the key that proves every one of these whole lines; None if none does."""
    return next((key for key in keys if lines and _proves(key, lines)), None)


def lines_of(data: bytes) -> bytes:
    """Return the whole lines of what a file holds: the last one may be torn."""
    return data[: data.rfind(b"\n") + 1]


def _proves(key: bytes, lines: bytes) -> bool:
    before = _BEGIN
    for line in lines.splitlines(keepends=True):
        match = _SEAL.search(line)
        if match is None:
            return False
        if not hmac.compare_digest(_mac(key, before, line[: match.start()] + b"}"), match[1]):
            return False
        before = match[1]
    return True


def _last_mac(lines: bytes) -> bytes:
    match = _SEAL.search(lines[lines.rfind(b"\n", 0, -1) + 1 :])
    return match[1] if match else _BEGIN


def _mac(key: bytes, before: bytes, text: bytes) -> bytes:
    return hmac.new(key, before + b"\n" + text, "sha256").hexdigest().encode()
