"""A file of figures, whole at every moment: for the textfile collector of Prometheus's exporter.

What a person has named by mistake, a disk image say, is neither written over nor removed.
"""

from __future__ import annotations

import os
from pathlib import Path

from qmpblock.errors import Error, RequestError, printable
from qmpblock.host.ourfiles import check_kind
from qmpblock.names import partial_file

__all__ = ["check", "remove", "replace"]

_MODE = 0o644  # the exporter is another user; nothing in it is a secret
_BEGINS = (b"# HELP qmpblock_",)


def check(path: str) -> None:
    """Refuse, before anything is done, a file that `replace` would leave as it is.

    :raise RequestError: it holds something else than figures of ours, or cannot be read.
    """
    try:
        check_kind(path, _BEGINS)
    except OSError as error:
        raise RequestError(f"cannot write {printable(path)}: {error.strerror}") from None


def replace(path: str, text: str) -> None:
    """Have a file hold this; whoever opens it sees all of it, or all of what was there before.

    :raise Error: it cannot be written, or holds something else; what was there before still is.
    """
    partial = partial_file(path)
    flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        for one in (path, partial):
            check_kind(one, _BEGINS)
        fd = os.open(partial, flags, _MODE)
        try:
            with os.fdopen(fd, "w", encoding="utf-8") as file:
                file.truncate()
                file.write(text)
            Path(partial).replace(path)
        except BaseException:
            Path(partial).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise Error(f"cannot write {printable(path)}: {error.strerror}") from None


def remove(path: str) -> None:
    """Have it be gone: what it said is not so any more.

    :raise Error: it cannot be removed, or holds something else.
    """
    try:
        check_kind(path, _BEGINS)
        Path(path).unlink(missing_ok=True)
    except OSError as error:
        raise Error(f"cannot remove {printable(path)}: {error.strerror}") from None
