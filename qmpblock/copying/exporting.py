"""A command of the user's that reads disks as they were, at a point that is there while it lives.

It finds them in its environment, by their URIs, or reads the content of one from its stdin::

    QEMU -- point in time -- NBD --> COMMAND                     for whoever speaks NBD
    QEMU -- point in time -- NBD --> us -- a pipe --> COMMAND    for whoever does not

Of a pipe the reader cannot tell whether it ended because all of it has been said. So where the
content cannot be read to its end, the command is ended, with all that it has started, before its
input is: it must not take a part for the whole.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import re
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qmpblock.cancellation import undisturbed
from qmpblock.copying.pointintime import PointInTime, opened, point_in_time, why_ended
from qmpblock.copying.windows import WINDOW, Window, in_order, windows
from qmpblock.errors import Error, NBDError, RequestError, StalledError
from qmpblock.host.usercommand import UserCommand, check_command

if TYPE_CHECKING:
    from qmpblock.copying.fleecing import Fleece
    from qmpblock.mapping import MappedDisk
    from qmpblock.nbd import Client
    from qmpblock.qemu.connection import Connection

__all__ = ["Export", "ExportResult", "ExportedDisk", "exported"]

_OURS = re.compile(r"NBD_URI(_\d+)?")  # of whoever runs us, in a point of their own
_ZEROS = memoryview(bytes(WINDOW))
_SIGNALLED = 128  # a shell's exit code for signal 0


@dataclass(frozen=True)
class ExportedDisk:
    """A disk that a command could read.

    :ivar uri: at which it did.
    :ivar size: in bytes.
    """

    disk: str
    uri: str
    size: int


@dataclass(frozen=True)
class ExportResult:
    """How a command fared.

    :ivar command: its words.
    :ivar exit_code: as a shell has it: its own, or 128 and the number of the signal that ended it.
    :ivar whole: whether the disks could be read, as they were, until it ended.
    :ivar sent: bytes of the disk that were written to its standard input, holes as zeros; None
        where that was not asked for.
    :ivar seconds: for which it ran.
    """

    command: tuple[str, ...]
    exit_code: int
    whole: bool
    disks: tuple[ExportedDisk, ...]
    sent: int | None
    seconds: float


@asynccontextmanager
async def exported(
    vm: Connection,
    disks: Sequence[MappedDisk],
    fleece: Fleece,
    words: Sequence[str],
    *,
    stdin: bool = False,
    stdout: int | None = None,
) -> AsyncIterator[Export]:
    """Run a command that reads disks as they are at the instant in which this is entered.

    On leaving it is waited for; then all is as it was. An exception inside, or a cancellation, ends
    the command and all that it has started.

    In its environment, `NBD_URI` is the URI of the first disk, and `NBD_URI_1`, `NBD_URI_2`, ...
    are those of all.

    :param words: the command's.
    :param stdin: have its standard input be the content of the one disk.
    :param stdout: a descriptor to be its standard output; None: ours.
    :raise NoSuchCommandError, CannotRunError: before anything is touched, if that can be seen.
    :raise RequestError: of `stdin`, with several disks; else, and what else is raised, as of
        `point_in_time`.
    :raise Error: on leaving: the content could not be read to its end, and the command was ended.
    """
    if stdin and len(disks) != 1:
        raise RequestError("the standard input of a command has room for the content of one disk")
    check_command(words)
    async with point_in_time(vm, disks, fleece) as points:
        async with _input(vm, next(iter(points.values())) if stdin else None) as source:
            environment = _environment([points[disk].uri for disk in disks])
            began = time.monotonic()
            command = await UserCommand.start(words, environment, stdin=source.given, stdout=stdout)
            source.has_been_given()
            export = Export(command, source)
            try:
                yield export
                code = await export.wait()
            except BaseException:
                await undisturbed(command.end())
                raise
        seconds = time.monotonic() - began
        export.broken = None if stdin else await why_ended(vm, points)
        export.result = ExportResult(
            command=tuple(words),
            exit_code=code if code >= 0 else _SIGNALLED - code,
            whole=export.broken is None,
            disks=tuple(ExportedDisk(one.name, points[one].uri, points[one].size) for one in disks),
            sent=source.sent if stdin else None,
            seconds=seconds,
        )


def _environment(uris: Sequence[str]) -> Mapping[str, str]:
    kept = {name: value for name, value in os.environ.items() if not _OURS.fullmatch(name)}
    numbered = {f"NBD_URI_{number}": uri for number, uri in enumerate(uris, 1)}
    return {**kept, "NBD_URI": uris[0], **numbered}


class Export:
    """A command that runs. Get it from `exported`.

    :ivar result: how it fared, after leaving.
    :ivar broken: which point ended before it did, if one did.
    """

    def __init__(self, command: UserCommand, source: _Input) -> None:
        self._command = command
        self._source = source
        self._code: int | None = None
        self.result: ExportResult | None = None
        self.broken: Error | None = None

    @property
    def sent(self) -> int:
        """Bytes that were written to its standard input by now; 0 where it is not given one."""
        return self._source.sent

    def pass_on(self, number: int) -> None:
        """Send it a signal that we got. See `qmpblock.host.usercommand`."""
        self._command.pass_on(number)

    async def wait(self) -> int:
        """Wait for its end, giving it its input; return its exit code, negative for a signal.

        :raise Error: its input failed, and it was ended.
        """
        if self._code is None:
            self._code = await self._wait()
        return self._code

    async def _wait(self) -> int:
        ended = asyncio.ensure_future(self._command.wait())
        feeding = asyncio.ensure_future(self._source.feed())
        try:
            await asyncio.wait({ended, feeding}, return_when=asyncio.FIRST_COMPLETED)
            if feeding.done():
                feeding.result()
            else:  # whatever it has left behind may still have our pipe: nobody waits for that
                feeding.cancel()
            return await ended
        except (NBDError, StalledError) as error:
            await undisturbed(self._command.end())
            raise Error(
                f"what the disk held could not be read to its end: {error.message}",
                standing="the command was ended before its input, so that it does not take a part "
                "for the whole: do not rely on what it made",
                remedy="if the point in time has ended, give it more room: --fleece-limit",
            ) from error
        finally:
            for one in (ended, feeding):
                one.cancel()
            await asyncio.gather(ended, feeding, return_exceptions=True)


class _Input:
    """The content of a disk on its way to the standard input of a command; or nothing."""

    given: int | None = None
    sent = 0

    async def feed(self) -> None:
        """Write all of it, and end it."""

    def has_been_given(self) -> None:
        """Leave to the command what is its own."""


class _Pipe(_Input):
    """The content of a disk.

    :ivar given: the command's end; `sent`: bytes that were written.
    """

    def __init__(self, client: Client) -> None:
        self._client = client
        self.given, self._end = os.pipe()
        os.set_blocking(self._end, False)
        with contextlib.suppress(OSError):  # more than this user may have
            fcntl.fcntl(self._end, fcntl.F_SETPIPE_SZ, WINDOW)

    def has_been_given(self) -> None:
        if self.given is not None:
            os.close(self.given)
            self.given = None

    async def feed(self) -> None:
        """Write all of it, and end it; or as much as is wanted, where its end is closed there.

        :raise NBDError, StalledError: it cannot be read; its end is not told.
        """
        parts = in_order(windows((self._client,), 0, self._client.size), self._read)
        with contextlib.suppress(BrokenPipeError):
            async with aclosing(parts):
                async for window, data in parts:
                    for piece in _pieces(window, data):
                        await self._write(piece)
        self.close()

    async def _read(self, window: Window) -> bytearray | None:
        return await self._client.read(window.offset, window.length) if window.reads[0] else None

    async def _write(self, piece: memoryview) -> None:
        while piece:
            try:
                written = os.write(self._end, piece)
            except BlockingIOError:
                await _writable(self._end)
            else:
                self.sent += written
                piece = piece[written:]

    def close(self) -> None:
        """End it. Idempotent."""
        self.has_been_given()
        if self._end >= 0:
            os.close(self._end)
            self._end = -1


@asynccontextmanager
async def _input(vm: Connection, point: PointInTime | None) -> AsyncIterator[_Input]:
    if point is None:
        yield _Input()
        return
    async with await opened(vm, point) as client:
        pipe = _Pipe(client)
        try:
            yield pipe
        finally:
            pipe.close()


def _pieces(window: Window, data: bytearray | None) -> Iterator[memoryview]:
    """Yield what a window holds; zeros, which may be many, in pieces."""
    if data is not None:
        yield memoryview(data)
        return
    for at in range(0, window.length, WINDOW):
        yield _ZEROS[: window.length - at]


async def _writable(fd: int) -> None:
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    loop.add_writer(fd, ready.set_result, None)
    try:
        await ready
    finally:
        loop.remove_writer(fd)
