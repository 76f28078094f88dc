"""A file of figures, whole at every moment: for the textfile collector of Prometheus's exporter.

What a person has named by mistake, a disk image say, is neither written over nor removed.
"""

from __future__ import annotations

import errno
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
        _check(path)
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
            _check(one)
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
        _check(path)
        Path(path).unlink(missing_ok=True)
    except OSError as error:
        raise Error(f"cannot remove {printable(path)}: {error.strerror}") from None


def _check(path: str) -> None:
    """See that a name is that of figures of ours, or of nothing: a device would lose its name."""
    if Path(path).exists() and not Path(path).is_file():
        raise FileExistsError(errno.EEXIST, "it exists, and is no plain file", path)
    check_kind(path, _BEGINS)
