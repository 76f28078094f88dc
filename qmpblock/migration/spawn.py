"""A destination on this host: its images made, its QEMU started, waiting; it outlives us."""

from __future__ import annotations

import asyncio
import os
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from qmpblock.changes.journalfile import FULL
from qmpblock.errors import (
    UNTOUCHED,
    ConnectError,
    NoRoomError,
    ToolError,
    UnsupportedError,
    printable,
)
from qmpblock.host.contents import Contents
from qmpblock.host.fallocate import keep_size
from qmpblock.host.qemuimg import QemuImg
from qmpblock.host.socketfolder import temporary_directory
from qmpblock.migration.diskterms import Layers
from qmpblock.migration.launch import Image, Launch, launch
from qmpblock.migration.origin import read_origin
from qmpblock.names import VM_FOLDER
from qmpblock.qemu.connection import Connection
from qmpblock.qemu.monitor import Monitor

__all__ = ["Spawned", "spawn"]

_POLL = 0.02  # seconds
#: Those that we started and left to themselves: nobody waits for their end.
_left: list[subprocess.Popen[bytes]] = []


@dataclass(frozen=True)
class Spawned:
    """A destination that waits.

    :ivar monitor: the address of its monitor; `pid`: its process.
    :ivar images: the files that were made.
    :ivar log: where it writes what it has to say.
    :ivar notes: what is to be looked at.
    """

    monitor: str
    pid: int
    images: tuple[str, ...]
    log: str
    notes: tuple[str, ...]


async def spawn(
    source: Connection,
    directory: str,
    *,
    qemu: str | None = None,
    format: str | None = None,  # noqa: A002 - the word of `copy`, and of the command
    layers: Layers = "all",
    preallocated: bool = False,
) -> Spawned:
    """Start a destination for a source on this host.

    It waits for a migration with `-S -incoming defer`, and goes on when this process ends.
    Cancelling ends it, and removes what was made.

    :param directory: in which its images are made.
    :param qemu: its program; None: the source's.
    :param format: of its images: qcow2 or raw; None: each disk's own, where that can be made.
    :param layers: what is to be copied to them; `preallocated`: see `launch`.
    :raise UnsupportedError: something is missing that only a person can add, or the file system
        cannot give an image host space; nothing was touched.
    :raise ToolError: an image could not be made, or QEMU ended: its words; nothing is left.
    :raise NoRoomError: there is no host space for all of an image; nothing is left.
    """
    origin = await read_origin(source)
    if not origin.words:
        raise UnsupportedError(
            "how the source was started cannot be seen from here",
            standing=UNTOUCHED,
            remedy="run this on its host, as its user or root; or look at what --command-line says",
        )
    folder = tempfile.mkdtemp(prefix=VM_FOLDER, dir=temporary_directory(f"{VM_FOLDER}xxxxxxxx/qmp"))
    made: list[str] = []
    started = None
    try:
        plan = launch(
            origin,
            directory=directory,
            sockets=folder,
            qemu=qemu,
            format=format,
            layers=layers,
            preallocated=preallocated,
        )
        _check(plan)
        for image in plan.images:
            await _make(image, source.stall)
            made.append(image.file)
        log = f"{folder}/log"
        started = _start(plan.words, log, source.monitor.peer_pid)
        await _answer(started, plan, log, source.stall)
    except BaseException:
        if started is not None:
            started.kill()
            started.wait()
        for file in made:
            Path(file).unlink(missing_ok=True)
        for left in Path(folder).iterdir():
            left.unlink()
        Path(folder).rmdir()
        raise
    _left.append(started)
    return Spawned(plan.monitor, started.pid, tuple(made), log, plan.notes)


def _check(plan: Launch) -> None:
    if plan.missing:
        raise UnsupportedError(
            "a destination cannot be started without: " + "; ".join(plan.missing),
            standing=UNTOUCHED,
            remedy="add it, and start the command line that --command-line prints",
        )
    there = [image.file for image in plan.images if os.path.lexists(image.file)]
    if there:
        raise UnsupportedError(
            f"{printable(there[0])} is there already",
            standing=UNTOUCHED,
            remedy="remove it, or name another --directory",
        )


async def _make(image: Image, stall: float) -> None:
    """Make an empty image of a disk's size, for its user alone.

    :raise NoRoomError: there is no host space for it; nothing is left.
    :raise UnsupportedError: its file system cannot give it any; likewise.
    """
    contents = Contents(image.size, ())
    options = {"preallocation": "metadata"} if image.preallocated else {}
    if image.format != "raw":
        on = None
        if image.backing is not None and image.backing_format is not None:
            on = image.backing, image.backing_format
        contents = await QemuImg(stall=stall).create(image.format, image.size, options, backing=on)
    fd = os.open(image.file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        contents.write_to(fd)
        if image.preallocated:
            keep_size(fd, 0, contents.length)
    except OSError as error:
        Path(image.file).unlink()
        kind = NoRoomError if error.errno in FULL else UnsupportedError
        raise kind(
            f"{printable(image.file)} cannot be made: {error.strerror}",
            standing=UNTOUCHED,
            remedy="make room there, or name another --directory",
        ) from None
    except BaseException:
        Path(image.file).unlink()
        raise
    finally:
        os.close(fd)


def _start(words: Sequence[str], log: str, source: int | None) -> subprocess.Popen[bytes]:
    """Start it: in a session of its own, where the source was (relative names count from there)."""
    at = None
    with suppress(OSError):
        at = os.readlink(f"/proc/{source}/cwd")  # noqa: PTH115 - of a process, no path of ours
    with open(log, "xb") as output:  # noqa: PTH123 - its descriptor is what is wanted
        return subprocess.Popen(
            list(words),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd=at,
            start_new_session=True,
        )


async def _answer(started: subprocess.Popen[bytes], plan: Launch, log: str, stall: float) -> None:
    """Wait until its monitor answers.

    :raise ToolError: it has ended, or says nothing.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + stall
    while started.poll() is None and loop.time() < deadline:
        if Path(plan.monitor).exists():
            with suppress(ConnectError):
                monitor = await Monitor.connect(plan.monitor, greeting_timeout=stall)
                await monitor.close()
                return
        await asyncio.sleep(_POLL)
    said = Path(log).read_text(errors="replace")
    raise ToolError(plan.words[:1], started.poll() or 0, said or "its monitor does not answer")
