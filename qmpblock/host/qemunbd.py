"""qemu-nbd, through which the contents of closed images are read.

It serves one image to one client, which is us, and ends with it. It is confined as qemu-img is, and
makes no socket of its own: it gets one that listens already, in whose queue our connection waits.
The name by which we connected is gone by then, so nobody else ever comes to it, and nothing is left
of it, whatever dies.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import shutil
import socket
import struct
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from qmpblock.errors import NBDError, NoRoomError, ToolError
from qmpblock.graph.jsonname import as_name
from qmpblock.host.handed import HandedFiles, MoreFiles
from qmpblock.host.toolwords import in_use_by_another, remedy
from qmpblock.host.writers import in_use
from qmpblock.names import READ_FOLDER, SOCKET

if TYPE_CHECKING:
    from qmpblock.nbd import Client

__all__ = ["QemuNbd"]

_CREDENTIALS = struct.Struct("3i")  # ucred (unix(7)): process, user, group
_SAID = 8192  # bytes of what it says that are kept
_END = 5.0  # seconds that it has to end by itself, once its client is gone


class QemuNbd:
    """The qemu-nbd program.

    :param program: its name or path.
    :param stall: seconds without any movement that count as a failure.
    """

    def __init__(self, program: str = "qemu-nbd", *, stall: float = 60.0) -> None:
        self.program = program
        self.stall = stall

    @asynccontextmanager
    async def serving(
        self, image: Mapping[str, Any], *, contexts: Sequence[str] = ("base:allocation",)
    ) -> AsyncIterator[Client]:
        """Serve an image that nothing writes to, read-only, with the rights of its owner.

        QEMU's locks are on it as long as that lasts: nobody else can open it for writing.
        Cancelling ends the program at once.

        :param image: as for blockdev-add, without `node-name`.
        :param contexts: NBD metadata contexts that the client asks for.
        :raise NotFoundError: there is no such file.
        :raise UnsupportedError: one of its files cannot be opened, and why.
        :raise InUseError: a running VM has one of them open for writing.
        :raise ToolError: qemu-nbd cannot be started, or cannot open it.
        :raise NBDError: it does not answer as it should.
        """
        more: dict[str, Sequence[str]] = {}
        async with contextlib.AsyncExitStack() as stack:
            while True:
                try:
                    server = _Server(self, HandedFiles(more=more), image)
                    client = await stack.enter_async_context(server.run(contexts))
                except MoreFiles as found:  # nothing was run
                    more[found.file] = found.names
                else:
                    break
            yield client


class _Server:
    """One run of the program."""

    def __init__(self, tool: QemuNbd, files: HandedFiles, image: Mapping[str, Any]) -> None:
        self._tool = tool
        self._files = files
        self._image = image
        self._command: list[str] = []

    @asynccontextmanager
    async def run(self, contexts: Sequence[str]) -> AsyncIterator[Client]:
        from qmpblock.nbd import Client

        with self._files as files:
            name = as_name(files.image(self._image))
            self._command = [self._tool.program, "-r", files.shown(name)]
            with _listening() as (listening, connection), files.listener(listening):
                process = await self._start(files.command(self._tool.program, ["-r", name]))
            # Only the program has the listening socket from here on: if it ends, we see it.
            assert process.stderr is not None
            complaints = asyncio.ensure_future(_hear(process.stderr))
            try:
                try:
                    client = await Client.connect(
                        connection, contexts=contexts, stall=self._tool.stall
                    )
                except NBDError:
                    await self._explain(process, complaints)
                    raise
                async with client:
                    yield client
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_END):
                        await process.wait()
            finally:
                if process.returncode is None:
                    process.kill()
                await process.wait()
                await complaints

    async def _start(self, command: Sequence[str]) -> asyncio.subprocess.Process:
        try:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
                pass_fds=self._files.descriptors,
            )
        except (OSError, ValueError) as error:  # too long an argument, or a NUL in one
            raise ToolError(self._command, 127, str(error)) from None
        with contextlib.suppress(OSError):  # it has ended
            resource.prlimit(process.pid, resource.RLIMIT_CORE, (0, 0))
        return process

    async def _explain(
        self, process: asyncio.subprocess.Process, complaints: asyncio.Future[bytes]
    ) -> None:
        """Raise what the program said, if it has ended."""
        try:
            async with asyncio.timeout(_END):
                code = await process.wait()
        except TimeoutError:
            return
        said = await complaints
        if not code:
            return
        self._files.refuse(code, said)
        text = self._files.shown(said.decode(errors="replace"))
        if in_use_by_another(text):
            raise in_use(self._files.shown(as_name(self._image)), text)
        raise ToolError(self._command, code, text, remedy=remedy(code, text, exclusive=False))


async def _hear(stream: asyncio.StreamReader) -> bytes:
    """Return the beginning of what the program says until it ends, which is never in its way."""
    said = b""
    while piece := await stream.read(_SAID):
        said = (said + piece)[:_SAID]
    return said


@contextlib.contextmanager
def _listening() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Yield a listening socket, and a connection that waits in its queue; both are nameless.

    :raise NoRoomError: a directory for the socket's name cannot be made.
    """
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with listening:
        try:
            _join(listening, connection)
            yield listening, connection
        except BaseException:
            connection.close()
            raise


def _join(listening: socket.socket, connection: socket.socket) -> None:
    folder = tempfile.mkdtemp(prefix=READ_FOLDER)  # for us alone
    try:
        fd = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            name = f"/proc/self/fd/{fd}/{SOCKET}"  # a socket's own path has room for 107 bytes
            listening.bind(name)
            listening.listen(1)
            connection.connect(name)
            os.unlink(SOCKET, dir_fd=fd)
        finally:
            os.close(fd)
    except OSError as error:
        raise NoRoomError(f"no socket can be made in {folder}: {error.strerror}") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    # Where others could put another directory in its place, that shows here.
    seen = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    if _CREDENTIALS.unpack(seen)[0] != os.getpid():
        raise NoRoomError(f"somebody has put another socket in the place of ours in {folder}")
    connection.setblocking(False)
