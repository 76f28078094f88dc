"""A file of figures, whole at every moment: for the textfile collector of Prometheus's exporter."""

from __future__ import annotations

import os
from pathlib import Path

from qmpblock.errors import Error, printable
from qmpblock.names import partial_file

__all__ = ["remove", "replace"]

_MODE = 0o644  # the exporter is another user; nothing in it is a secret


def replace(path: str, text: str) -> None:
    """Have a file hold this; whoever opens it sees all of it, or all of what was there before.

    :raise Error: it cannot be written; what was there before still is.
    """
    partial = partial_file(path)
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(partial, flags, _MODE), "w", encoding="utf-8") as file:
            file.write(text)
        Path(partial).replace(path)
    except OSError as error:
        raise Error(f"cannot write {printable(path)}: {error.strerror}") from None


def remove(path: str) -> None:
    """Have it be gone: what it said is not so any more."""
    try:
        Path(path).unlink(missing_ok=True)
    except OSError as error:
        raise Error(f"cannot remove {printable(path)}: {error.strerror}") from None
