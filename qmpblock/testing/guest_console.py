"""The listening end of a guest's serial line: lines in, lines out, and the evidence.

It knows the form of the protocol's lines (an answer carries its command's number, a line that
begins with `*` comes unasked), not their meaning: that is `guest_protocol.py`.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Self, TypeVar

from qmpblock.errors import Error, RequestError, StalledError, printable
from qmpblock.testing.loops import check_loop

__all__ = ["GuestConsole", "GuestError", "evidence"]

T = TypeVar("T")

_LINE_LIMIT = 8192
_LOOK = 0.5  # seconds between looks whether the VM runs
_ENDED = {
    "guest-panicked": "look at its console",
    "internal-error": "QEMU gave the CPU up: under KVM it met what it cannot emulate",
    "io-error": "a request of its disk failed, and werror or rerror says stop: "
    "mend the storage, then vm.execute('cont')",
    "postmigrate": "it has been migrated away: ask the guest at its destination",
    "shutdown": "it was switched off",
}
_TRANSCRIPT = 30
"""Lines kept as evidence."""


class GuestError(Error):
    """The tiny guest refused or failed a command, or its line is closed.

    :param transcript: the last lines on the serial line, `>` ours and `<` the guest's.
    :param status: where its disk failed a request, the device's status (virtio-blk: 1 I/O
        error, 2 unsupported; SCSI: response, status and sense key, a byte each); else None.
    """

    def __init__(
        self, message: str, transcript: tuple[str, ...] = (), *, status: int | None = None
    ) -> None:
        self.transcript = transcript
        self.status = status
        super().__init__(message, standing=evidence(transcript))


def evidence(transcript: tuple[str, ...]) -> str:
    """Word the last lines of a console for an error's `standing`."""
    lines = "".join(f"\n  {printable(line)}" for line in transcript[-10:])
    return f"The last lines of the guest's serial port:{lines or ' none'}"


class GuestConsole:
    """The listening end of a serial line: lines in, lines out, and the evidence.

    A QEMU that connects after another one went away takes its place, so a killed VM can be
    started again on the same socket.

    :ivar diagnose: says why the guest does not answer; for the error that its silence raises.
    :ivar run_state: tells the VM's (QMP's RunState), or None where QEMU does not say.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.diagnose: Callable[[], Awaitable[str]] | None = None
        self.run_state: Callable[[], Awaitable[str | None]] | None = None
        self.connected = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._connections = 0
        self._greeted = False  # by the guest on this connection
        self._writer: asyncio.StreamWriter | None = None
        self._server: asyncio.Server | None = None
        self._lines: deque[str] = deque(maxlen=_TRANSCRIPT)
        self._news = asyncio.Event()
        self._heard = 0.0
        self._ready: str | None = None
        self._done: dict[int, str] = {}
        self._answer: tuple[int, bool, str] | None = None

    @classmethod
    @asynccontextmanager
    async def listen(cls, path: str | os.PathLike[str]) -> AsyncIterator[Self]:
        """Listen on a UNIX socket at `path` (made, and removed at the end).

        :raises RequestError: the path is too long for a UNIX socket, or cannot be used.
        """
        console = cls(os.fspath(path))
        await console.open()
        try:
            yield console
        finally:
            await console.close()

    async def open(self) -> None:
        """Begin to listen; `listen` does this, and `close` at the end.

        :raises RequestError: as `listen`.
        """
        self._loop = asyncio.get_running_loop()
        try:
            self._server = await asyncio.start_unix_server(
                self._serve, self.path, limit=_LINE_LIMIT
            )
        except OSError as error:
            raise RequestError(
                f"cannot listen at {printable(self.path)} for a guest's serial line: {error}",
                remedy="use a path of fewer than 108 bytes in a directory of your own",
            ) from error
        Path(self.path).chmod(0o600)

    async def close(self) -> None:
        """Close the line and remove the socket. Idempotent."""
        server, self._server = self._server, None
        if server is None:
            return
        server.close()
        self._hang_up()
        await server.wait_closed()
        Path(self.path).unlink(missing_ok=True)

    def _hang_up(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()
        self.connected = False
        self._news.set()

    @property
    def transcript(self) -> tuple[str, ...]:
        """The last lines, `>` ours and `<` the guest's, oldest first."""
        return tuple(self._lines)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._hang_up()  # the line of a QEMU of before
        self._writer, self.connected, self._greeted = writer, True, False
        self._connections += 1
        self._ready = None
        self._done.clear()
        try:
            while line := await reader.readline():
                if self._writer is not writer:
                    return  # another QEMU has taken the line
                self._take(line.decode("ascii", "backslashreplace").rstrip("\r\n"))
        except (ConnectionError, ValueError):
            pass  # killed in the middle; or a line beyond the limit: no guest of ours sends it
        finally:
            if self._writer is writer:
                self._hang_up()
            writer.close()

    def _take(self, line: str) -> None:
        self._lines.append(f"< {line}")
        self._heard = asyncio.get_running_loop().time()
        # a reset cuts off whatever was being said, a greeting too
        _, greeting, rest = line.rpartition("*READY ")
        word, _, rest = (greeting + rest).partition(" ")
        if word == "*READY":
            self._ready, self._greeted = rest, True
        elif word == "*DONE" and (match := re.match(r"disk=(\d{1,3}) ", rest)):
            self._done[int(match[1])] = rest
        elif word in ("OK", "ER") and (match := re.match(r"(\d{1,9})(?: (.*))?$", rest)):
            self._answer = (int(match[1]), word == "OK", match[2] or "")
        self._news.set()

    async def send(self, line: str) -> None:
        """Send one line.

        :raises GuestError: nobody is connected.
        :raises WrongLoopError: another event loop runs here than where it was opened.
        """
        check_loop(self._loop, "this guest's line")
        if self._writer is None:
            raise GuestError(f"cannot send {line!r}: the guest's line is closed", self.transcript)
        self._lines.append(f"> {line}")
        self._writer.write(line.encode("ascii") + b"\n")
        try:
            await self._writer.drain()
        except ConnectionError as error:
            raise GuestError(f"the guest's line closed at {line!r}", self.transcript) from error

    def take_ready(self) -> str | None:
        """Return the greeting that came since the last call."""
        ready, self._ready = self._ready, None
        return ready

    def take_done(self, disk: int) -> str | None:
        """Return the end of a stress run on `disk`, if it came since the last call."""
        return self._done.pop(disk, None)

    def take_answer(self, number: int) -> tuple[bool, str] | None:
        """Return the answer to that command, (whether OK, the rest), if it has come."""
        if self._answer is None or self._answer[0] != number:
            return None
        _, ok, rest = self._answer
        return ok, rest

    async def stalled(self, message: str, standing: str = "") -> StalledError:
        """Make the error of a guest that does not go on, with the diagnosis if there can be one.

        :param standing: more that is known.
        """
        why = [] if self.diagnose is None else [await self.diagnose()]
        known = "\n".join([*([standing] if standing else []), *why, evidence(self.transcript)])
        return StalledError(message, standing=known)

    async def wait(
        self, what: str, find: Callable[[], T | None], stall: float, *, fresh: bool = False
    ) -> T:
        """Wait until `find` finds something.

        :param stall: so many seconds without a line from the guest fail it.
        :param fresh: it is to come from a guest that has not greeted yet: the end of a
            connection that has been greeted on, which is a QEMU of before, means nothing.
        :raises StalledError: that happened.
        :raises GuestError: the line was open, or opened meanwhile, and closed; or the VM does not
            run, so that no guest can answer (paused: at two looks, for a moment is nothing).
        """
        paused = False
        loop = asyncio.get_running_loop()
        self._heard = loop.time()
        was_connected, connections = self.connected, self._connections
        while (found := find()) is None:
            opened = was_connected or self._connections > connections
            if opened and not self.connected and not (fresh and self._greeted):
                raise GuestError(
                    f"the guest's line closed while waiting for {what}", self.transcript
                )
            left = self._heard + stall - loop.time()
            if left <= 0:
                raise await self.stalled(
                    f"the guest was silent for {stall:g} s while waiting for {what}"
                )
            self._news.clear()
            try:
                async with asyncio.timeout(min(left, _LOOK)):
                    await self._news.wait()
            except TimeoutError:  # a line may have come meanwhile: `left` says
                state = await self.run_state() if self.run_state is not None else None
                if state in _ENDED or (state == "paused" and paused):
                    raise self._no_guest(what, state) from None
                paused = state == "paused"
        return found

    def _no_guest(self, what: str, state: str) -> GuestError:
        error = GuestError(
            f"no guest can answer: its VM is in the run state {state}, while waiting for {what}",
            self.transcript,
        )
        error.remedy = _ENDED.get(state, "let it go on first: vm.execute('cont')")
        return error
