"""One of QEMU's programs, run on images that are handed to it, for as long as it does something."""

from __future__ import annotations

import asyncio
import contextlib
import resource
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from typing import Any, TypeVar

from qmpblock.errors import StalledError, ToolError, printable
from qmpblock.host.handed import HandedFiles, MoreFiles
from qmpblock.host.processes import end_child, processor_time
from qmpblock.host.toolwords import remedy

__all__ = ["Program"]

_T = TypeVar("_T")

_LINE = 1 << 20  # bytes
_TICK = 1.0  # seconds between two looks whether it does something


class Program:
    """A program of QEMU's: qemu-img, qemu-io.

    :param program: its name or path.
    :param stall: seconds without any output, and without any use of the processor, that count as
        a failure.
    """

    def __init__(self, program: str, *, stall: float = 60.0) -> None:
        self.program = program
        self.stall = stall

    async def _lines(
        self,
        command: Callable[[HandedFiles], Sequence[str]],
        *,
        exclusive: bool = True,
        given: str | None = None,
        more: dict[str, Sequence[str]] | None = None,
        **handed: Any,
    ) -> AsyncGenerator[str, None]:
        """Run it and yield what it prints, line by line.

        :param command: hands the files, and returns the arguments.
        :param given: what it is to read on stdin.
        :param more: see `HandedFiles`, as the rest; what is found is added to it.
        :raise ToolError: it cannot be started, or fails.
        :raise UnsupportedError: it may not open one of the files.
        :raise StalledError: it did nothing for the stall limit.
        """
        more = {} if more is None else more
        while True:
            with HandedFiles(more=more, **handed) as files:
                try:
                    run = self._run(command(files), files, exclusive=exclusive, given=given)
                    async with aclosing(run) as lines:
                        async for line in lines:
                            yield line
                except MoreFiles as found:  # nothing was run
                    more[found.file] = found.names
                else:
                    return

    async def _run(
        self,
        arguments: Sequence[str],
        files: HandedFiles,
        *,
        exclusive: bool = True,
        given: str | None = None,
        separator: bytes = b"\n",
    ) -> AsyncGenerator[str, None]:
        """Run it once; `separator` ends what counts as a line."""
        command = [self.program, *map(files.shown, arguments)]
        try:
            process = await asyncio.create_subprocess_exec(
                *files.command(self.program, arguments),
                stdin=asyncio.subprocess.DEVNULL if given is None else asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                limit=_LINE,
                pass_fds=files.descriptors,
            )
        except (OSError, ValueError) as error:  # too long an argument, or a NUL in one
            raise ToolError(command, 127, str(error)) from None
        with contextlib.suppress(OSError):  # it has ended
            resource.prlimit(process.pid, resource.RLIMIT_CORE, (0, 0))  # it may have keys
        assert process.stdout is not None
        assert process.stderr is not None
        complaints = asyncio.ensure_future(process.stderr.read())
        try:
            if given is not None:
                assert process.stdin is not None
                process.stdin.write(given.encode())
                process.stdin.write_eof()
            while True:
                line = await self._awaited(process, _line(process.stdout, separator))
                if not line:
                    break
                yield line.decode(errors="replace")
            complaint = await self._awaited(process, complaints)
            code = await self._awaited(process, process.wait())
        except TimeoutError:
            raise StalledError(
                f"{printable(' '.join(command), 1000)} did nothing for {self.stall:g} s",
                remedy="look whether the storage of the image hangs",
            ) from None
        except ValueError:
            raise ToolError(command, 0, "it printed a line without an end") from None
        finally:
            complaints.cancel()
            await asyncio.wait({complaints})
            await end_child(process)
        if code:
            files.refuse(code, complaint)
            said = files.shown(complaint.decode(errors="replace"))
            raise ToolError(command, code, said, remedy=remedy(code, said, exclusive=exclusive))

    async def _awaited(self, process: asyncio.subprocess.Process, what: Awaitable[_T]) -> _T:
        """Wait for something of the program's, as long as it uses the processor.

        :raise TimeoutError: it did nothing for the stall limit.
        """
        async with asyncio.timeout(self.stall) as limit:
            with _put_off(limit, self.stall, process.pid):
                return await what


@contextmanager
def _put_off(limit: asyncio.Timeout, stall: float, pid: int) -> Iterator[None]:
    """Let a limit begin anew whenever a process is seen to have used the processor.

    It may be silent for long and work all the time: on a large image, or while it makes the key of
    an encrypted one, which on a busy machine takes a minute.
    """
    loop = asyncio.get_running_loop()
    tick = min(_TICK, stall / 4)
    used: tuple[bytes, ...] | None = None
    timer: asyncio.TimerHandle

    def look() -> None:
        nonlocal used, timer
        now = processor_time(pid)
        if used is not None and now != used and not limit.expired():
            limit.reschedule(loop.time() + stall)
        used = now
        timer = loop.call_later(tick, look)

    timer = loop.call_later(tick, look)
    try:
        yield
    finally:
        timer.cancel()


async def _line(stream: asyncio.StreamReader, separator: bytes) -> bytes:
    """Read up to a separator, and that; or what is left.

    :raise ValueError: it is too long.
    """
    try:
        return await stream.readuntil(separator)
    except asyncio.IncompleteReadError as error:
        return error.partial
    except asyncio.LimitOverrunError as error:
        raise ValueError(str(error)) from None
