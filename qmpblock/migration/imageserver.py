"""ImageServer: a storage daemon that has a destination's images while they are mirrored.

A `qemu-storage-daemon` on this host: a third process, beside source and destination. A destination
that waits takes no lock on its images, and reads them again once the guest is there (F32); so
another process can write to them until then, and has to have ended before the source sends the rest
(K36). An NBD client that goes away does no harm to it, as it does to a destination of QEMU 7.2
(K1).

It runs as the destination's user, opens the files that the destination has open, with the keys
that this one has, and serves them on a socket of ours, which it inherits. It has no monitor:
SIGTERM has it write all that it holds, and end. It outlives us; the run in its command line tells
whoever recovers which one it was.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qmpblock.address import UnixAddress
from qmpblock.errors import (
    UNTOUCHED,
    Error,
    StalledError,
    UnsupportedError,
    printable,
)
from qmpblock.export.server import is_listening
from qmpblock.host.handed import HandedFiles, User
from qmpblock.host.processes import command_line, describe_process
from qmpblock.host.qemuimg import handed_keys
from qmpblock.host.socketfolder import SocketFolder, remove_socket
from qmpblock.migration.imagedaemon import NAME, ImageDaemon, described
from qmpblock.migration.imagenodes import NodesHere, mark
from qmpblock.migration.options import program
from qmpblock.migration.serverthere import ServerThere
from qmpblock.names import export_name, socket_folder
from qmpblock.qemu.capabilities import Capabilities
from qmpblock.qemu.iothread import iothread_of

if TYPE_CHECKING:
    from qmpblock.graph.model import DiskDevice
    from qmpblock.host.qemuimg import Key
    from qmpblock.qemu.connection import Connection

__all__ = ["ImageServer", "end_image_server", "image_server", "image_server_left"]

_QEMU = re.compile(r"qemu-(?:system-[\w-]+|kvm)$")
_MISSING = (
    f"{NAME} is not here, neither beside the destination's QEMU nor in the path: install it "
    "(Debian: qemu-system-common)"
)
_ENDING = 2.0  # seconds for it to end by itself; then for the kernel to end it
_POLL = 0.005
#: Left to themselves: nobody waits for the end of one that outlives its migration.
_left: list[subprocess.Popen[bytes]] = []


class ImageServer(ImageDaemon):
    """One on this host. Made by `of`.

    :param files: of each image, by names that lead to them here.
    :param keys: of those that are encrypted, which the words name.
    """

    def __init__(
        self,
        run: str,
        words: Sequence[str],
        files: Sequence[Sequence[str]],
        keys: Sequence[Key],
        user: User | None,
        stall: float,
    ) -> None:
        self._folder = SocketFolder(socket_folder(run))
        super().__init__(run, UnixAddress(self._folder.socket), len(files), stall)
        self._words = list(words)
        self._files = files
        self._keys = keys
        self._user = user
        self._process: subprocess.Popen[bytes] | None = None
        self._log = -1

    @classmethod
    async def of(cls, vm: Connection, run: str, disks: Sequence[DiskDevice]) -> ImageServer:
        """Say how the disks of a destination are served. Changes nothing.

        :raise UnsupportedError: they cannot be: says why.
        """
        pid = vm.monitor.peer_pid
        if pid is None:
            raise UnsupportedError(
                "the destination's process cannot be seen from here (its monitor is reached by "
                "TCP, say), and a storage daemon, which would be on this host, cannot have its "
                "images",
                standing=UNTOUCHED,
                remedy="do without the storage daemon, or reach the destination by ssh, where that "
                "starts one on its host",
            )
        program, nodes = _program(command_line(pid)), NodesHere(pid, vm.monitor)
        words, made = await described(nodes, run, disks)
        opened = [
            [str(node[edge]["filename"]) for edge in ("file", "data-file") if edge in node]
            for node in made
        ]
        user = User.of_process(pid)
        theirs = os.geteuid() == 0 and user.uid != 0
        words = [*program, *words]
        return cls(run, words, opened, nodes.keys, user if theirs else None, vm.stall)

    def marks(self) -> tuple[str, ...]:
        """See `ImageDaemon`. Nothing, where one is a device, or not there any more."""
        try:
            return tuple(" ".join(map(mark, files)) for files in self._files)
        except (OSError, UnsupportedError):
            return ()

    async def start(self) -> None:
        """See `ImageDaemon`."""
        try:
            self._folder.make()
        except OSError as error:
            raise Error(
                f"cannot make the directory {self._folder.path} for a socket: {error.strerror}",
                remedy="set TMPDIR to a directory that this user may write to, and nobody else, "
                "unless it is sticky as /tmp is (mode 1777)",
            ) from None
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
                listener.bind(self._folder.socket)
                listener.listen()
                self._start(listener.fileno())
            await self._until_it_serves(self._words[0])
        except BaseException:
            await self.end()
            raise

    def _start(self, listening: int) -> None:
        address = {"addr": {"type": "fd", "str": str(listening)}}
        # Before the exports, which need it; and before the images, which need the keys.
        at = self._words.index("--blockdev")
        first = ["--nbd-server", json.dumps(address)]
        rights: dict[str, Any] = {}
        if self._user is not None:
            rights = {
                "user": self._user.uid,
                "group": self._user.gid,
                "extra_groups": self._user.groups,
            }
        self._log = os.memfd_create(NAME)
        with HandedFiles() as files:
            first += handed_keys(files, self._keys)
            self._process = subprocess.Popen(
                [*self._words[:at], *first, *self._words[at:]],
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                pass_fds=[listening, *files.descriptors],
                cwd="/",
                start_new_session=True,  # Ctrl-C is for us
                **rights,
            )
        _left.append(self._process)

    def _ended(self) -> int | None:
        assert self._process is not None  # it was started
        return self._process.poll()

    def said(self) -> str:
        """See `ImageDaemon`."""
        if self._log < 0:
            return ""
        return os.pread(self._log, 1 << 16, 0).decode(errors="replace").strip()

    async def end(self) -> str:
        """See `ImageDaemon`."""
        process, fate = self._process, ""
        if process is not None:
            killed = await _end(process.pid)
            code = process.wait()  # it is a child, which somebody has to hear of
            self.whole = code == 0 and not killed
            if killed:
                fate = "the storage daemon did not end by itself, and was killed"
            elif code:
                fate = f"the storage daemon has ended (exit code {code})"
                fate += f": {printable(self.said(), 400)}" if self.said() else ""
            _left.remove(process)
            self._process = None
        self._folder.remove()
        log, self._log = self._log, -1
        if log >= 0:
            os.close(log)
        return fate


async def image_server(
    vm: Connection, run: str, disks: Sequence[DiskDevice], *, wanted: bool
) -> tuple[ImageDaemon | None, str]:
    """Return what serves a destination's disks; None: it does so itself. Changes nothing.

    Also where it is not wanted: a destination that would die of its own exports (K1) has one, if
    it can.

    :return: also what is to be warned of; empty where nothing is.
    :raise UnsupportedError: it is wanted, and cannot be.
    """
    forward = vm.monitor.forward
    if wanted and disks:
        if forward is not None:
            return await ServerThere.of(vm, forward, run, disks), ""
        return await ImageServer.of(vm, run, disks), ""
    if not await _dies_of_exports(vm, disks):
        return None, ""
    instead = "with --storage-daemon a process of its own has the images there, and outlives that"
    if forward is None:
        try:
            return await ImageServer.of(vm, run, disks), ""
        except UnsupportedError as error:
            instead = error.message
    return None, (
        f"the destination's QEMU {Capabilities(vm.monitor.version)} aborts where its connection "
        f"to the source breaks, for a disk is in an iothread; {instead}"
    )


async def _dies_of_exports(vm: Connection, disks: Sequence[DiskDevice]) -> bool:
    if not Capabilities(vm.monitor.version).nbd_clients_endanger_iothreads:
        return False
    threads = await vm.monitor.execute("query-iothreads")
    try:
        return any([await iothread_of(vm.monitor, disk, threads) for disk in disks])
    except UnsupportedError:
        return True  # it cannot be told


def _program(options: Sequence[str]) -> list[str]:
    """Return what starts it: beside the QEMU that was started so, else in the path.

    :raise UnsupportedError: it is not here.
    """
    started, _ = program(options)
    beside = [_QEMU.sub(NAME, word) for word in started]
    if beside and beside[-1] != started[-1] and os.access(beside[-1], os.X_OK):
        return beside
    found = shutil.which(NAME)
    if found is None:
        raise UnsupportedError(_MISSING, standing=UNTOUCHED, remedy="install it, or do without it")
    return [found]


# -- one whose migration's controller is gone


def image_server_left(run: str) -> bool:
    """Whether a storage daemon of a migration lives, or its socket is left."""
    path = SocketFolder(socket_folder(run)).socket
    # Where something else listens there it is the destination itself, and its own to take away.
    return any(_of_run(run)) or (Path(path).exists() and not is_listening(path))


async def end_image_server(run: str) -> None:
    """End the storage daemon of a migration, if there is one, and remove its socket. Idempotent.

    :raise StalledError: it does not end.
    """
    for pid in list(_of_run(run)):
        await _end(pid, run)
    path = SocketFolder(socket_folder(run)).socket
    if not is_listening(path):
        remove_socket(path)


def _of_run(run: str) -> Iterator[int]:
    """Yield the processes that are a storage daemon of that run, by their command lines."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and _is_of_run(int(entry.name), run):
            yield int(entry.name)


def _is_of_run(pid: int, run: str) -> bool:
    words = command_line(pid)
    name = json.dumps({"name": export_name(run, 0)})[1:-1]
    return any(word == "--export" and name in after for word, after in pairwise(words))


async def _end(pid: int, run: str | None = None) -> bool:
    """End a process: by SIGTERM, else by SIGKILL.

    :param run: whose storage daemon it has to be; None: it is a child of ours.
    :return: whether SIGKILL was needed.
    :raise StalledError: it does not end.
    """
    with contextlib.suppress(ProcessLookupError):
        held = os.pidfd_open(pid)  # from here on the number is no other's for it
        try:
            if run is not None and not _is_of_run(pid, run):
                return False
            for number in (signal.SIGTERM, signal.SIGKILL):
                signal.pidfd_send_signal(held, number)
                if await _has_ended(held):
                    return number == signal.SIGKILL
        finally:
            os.close(held)
        raise StalledError(
            f"the storage daemon, {describe_process(pid)}, has the destination's images open, and "
            "does not end: an image's storage hangs",
            remedy="mend the storage; the daemon ends with it",
        )
    return False


async def _has_ended(process: int) -> bool:
    """Wait until all threads of a process have ended: one that is left may have files open."""
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(process, ended.set)
    try:
        async with asyncio.timeout(_ENDING):
            await ended.wait()
    except TimeoutError:
        return False
    finally:
        loop.remove_reader(process)
    return True
