"""The name of a target's file: whether it can be had, and nothing of anybody's is lost by it."""

from __future__ import annotations

import os
import posixpath
import stat
from collections.abc import Sequence
from pathlib import Path

from qmpblock.address import MonitorAddress, SSHAddress
from qmpblock.errors import (
    UNTOUCHED,
    Error,
    InUseError,
    RequestError,
    UnsupportedError,
    printable,
    shell_words,
)
from qmpblock.graph.places import FileId
from qmpblock.host.filelocks import is_used
from qmpblock.host.openfiles import NOWHERE, openers, sees_directory
from qmpblock.host.processes import describe_process
from qmpblock.names import partial_file

__all__ = [
    "absolute",
    "check_file",
    "check_host",
    "check_name",
    "check_seen",
    "check_unopened",
    "drop_unfinished",
]


def absolute(file: str | os.PathLike[str]) -> str:
    """Return the absolute path of a file that a person has named.

    :raise RequestError: it is no path.
    """
    name = os.fspath(file)
    if not name or "\0" in name or "://" in name or name.startswith("json:"):
        raise RequestError(f"{printable(repr(name))} is not the path of a file")
    if name.endswith("/"):
        raise RequestError(f"{printable(repr(name))} is the path of a directory, and not of a file")
    return os.path.normpath(Path.cwd() / name)  # without resolving links: the name is the user's


def check_file(
    pid: int | None,
    file: str,
    *,
    force: bool,
    keeps_name: bool,
    resume: bool = False,
    restarts: bool = False,
) -> None:
    """Refuse to make a target that would destroy something, or that QEMU would not find.

    :param pid: of QEMU.
    :param force: whether a file of that name may be replaced, once the copy is whole.
    :param resume: whether what another copy left unfinished is gone on from.
    :param restarts: whether what a copy left that was ended goes (`drop_unfinished`).
    :raise RequestError: there is something of that name, or no such directory.
    :raise InUseError: somebody has open what may be replaced.
    :raise UnsupportedError: QEMU does not see that directory.
    """
    folder = posixpath.dirname(file)
    check_seen(pid, folder)
    check_name(folder, partial_file(file))
    for name in {file} if resume else {file, partial_file(file)}:
        if os.path.lexists(name):
            partial = name != file
            goes = (force and not keeps_name) or (restarts and partial)
            _check_replaceable(name, force=goes, partial=partial)


def check_host(address: MonitorAddress, verb: str, words: Sequence[str]) -> None:
    """Refuse to write files for a VM on another host: they are made on its own.

    :param words: that follow the address on the command's line.
    :raise UnsupportedError: it is on another one.
    """
    if not isinstance(address, SSHAddress):
        return
    there = address.host if address.user is None else f"{address.user}@{address.host}"
    port = [] if address.port is None else ["-p", str(address.port)]
    command = shell_words(["qmpblock", verb, address.path, *words])
    raise UnsupportedError(
        f"its files are made by QEMU, on its own host, and that is {printable(address.host)}",
        standing=UNTOUCHED,
        remedy=f"run it there: {shell_words(['ssh', *port, there, command])}",
    )


def check_seen(pid: int | None, folder: str, *, to_be: str | None = None) -> None:
    """Refuse a directory that QEMU does not see as it is here.

    :param pid: of QEMU.
    :param to_be: which one will be made in it, and is meant; None: itself.
    :raise RequestError: there is no such directory.
    :raise UnsupportedError: QEMU does not see it.
    """
    elsewhere, named = sees_directory(pid, folder), printable(to_be or folder)
    if elsewhere == NOWHERE:
        raise RequestError(f"there is no directory {named}", standing=UNTOUCHED)
    if elsewhere is not None:
        raise UnsupportedError(
            f"a target is made here and written by the VM, and {named} {elsewhere}",
            standing=UNTOUCHED,
            remedy="name a target in a directory that the VM has, too, and run qmpblock on its "
            "host, by a UNIX monitor, as the VM's user or root",
        )


def check_name(folder: str, file: str) -> None:
    """Refuse a name that is longer than its file system takes.

    :raise RequestError: it is.
    """
    length = len(os.fsencode(posixpath.basename(file)))
    try:
        most = os.pathconf(folder, "PC_NAME_MAX")
    except OSError:
        return  # whoever makes it is told
    if length > most:
        raise RequestError(
            f"the name {printable(file)}, by which it is made, is of {length} bytes, and "
            f"{printable(folder)} takes {most}",
            standing=UNTOUCHED,
            remedy="name another target",
        )


def drop_unfinished(file: str) -> None:
    """Remove what a copy to a file left that was ended, if anything; never one that is made now.

    :raise InUseError: somebody has it open.
    :raise RequestError: it is no plain file.
    :raise Error: it cannot be removed.
    """
    name = partial_file(file)
    if not os.path.lexists(name):
        return
    _check_replaceable(name, force=True, partial=True)
    try:
        Path(name).unlink()
    except OSError as error:
        raise Error(f"cannot remove {printable(name)}: {error.strerror}") from None


def _check_replaceable(name: str, *, force: bool, partial: bool) -> None:
    status = os.lstat(name)
    if force and stat.S_ISREG(status.st_mode):
        check_unopened(name, status)
        return
    raise RequestError(
        f"{printable(name)} exists already"
        + (": a copy that is not whole, or is being made" if partial else ""),
        standing=UNTOUCHED,
        remedy=("go on from it with --resume; or " if partial else "")
        + "name another target, or remove that file; --force replaces a plain file, once the copy "
        "is whole, but none to which the guest goes over",
    )


def check_unopened(name: str, status: os.stat_result, *, standing: str | None = UNTOUCHED) -> None:
    """Refuse to take a name from a file that somebody has open: an image of this VM, of another.

    Whoever opens it again, as a VM does when it is started again, would find the copy there.

    :raise InUseError: somebody has.
    """
    file = FileId.of(status)
    if file is None:
        return
    users = [describe_process(pid) for pid in openers(file)]
    if not users and is_used(file):
        users = ["a QEMU, by its locks"]
    if users:
        raise InUseError(
            f"{printable(name)} is open in {', '.join(users)}: it is not replaced",
            standing=standing,
            remedy="name another target, or end what uses it",
        )
