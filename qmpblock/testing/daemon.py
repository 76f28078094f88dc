"""StorageDaemon: a qemu-storage-daemon that serves disks by NBD, for a client to be tested on.

It has QEMU's block layer and no guest::

    async with StorageDaemon(built.disks) as server:
        data = await read_area(server.uri("d0"), 0, 65536)

A server that hangs is `pause()`, one that dies is `kill()`, one that comes back is `start()`.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

from qmpblock.errors import ConnectError, GreetingError, RequestError, StalledError, ToolError
from qmpblock.host.processes import die_with_parent
from qmpblock.qemu.monitor import Monitor
from qmpblock.testing.commandline import served_arguments
from qmpblock.testing.images import BuiltDisk, find_qemu
from qmpblock.testing.loops import check_loop, running_loop
from qmpblock.testing.scratch import private_directory, remove

__all__ = ["StorageDaemon"]

_START_LIMIT = 30.0  # seconds until its monitor answers
_END_LIMIT = 30.0  # seconds until it has ended, once asked
_POLL = 0.003  # seconds


class StorageDaemon:
    """A qemu-storage-daemon with disks, each exported by NBD under its name.

    `async with` starts it, and ends it. It dies with the test run.

    :param disks: their images, opened with what `faults.inject` and `faults.slow` say.
    :param writable: whether the exports are.
    :param bitmaps: of each disk by name, dirty bitmaps to be served as NBD contexts.
    :param program: default: beside the tested QEMU, else in the path.
    :ivar directory: with its sockets: `nbd`, and `qmp` for another client of its monitor.
    """

    def __init__(
        self,
        disks: Sequence[BuiltDisk],
        *,
        writable: bool = False,
        bitmaps: Mapping[str, Sequence[str]] | None = None,
        program: str | None = None,
    ) -> None:
        self.directory = private_directory()
        self.monitor_path = str(self.directory / "qmp")
        self._disks = tuple(disks)
        self._writable = writable
        self._bitmaps = bitmaps or {}
        self._program = program
        self._control: Monitor | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if value is not None:
            value.add_note(f"{self._name()} said: {self.stderr.strip() or 'nothing'}")
        await self.close()

    def uri(self, disk: BuiltDisk | str) -> str:
        """Return the NBD URI of a disk's export.

        :raise RequestError: there is no such disk; the message lists those that there are.
        """
        name = disk.spec.name if isinstance(disk, BuiltDisk) else disk
        names = [one.spec.name for one in self._disks]
        if name not in names:
            raise RequestError(f"no disk {name!r} is served; there are: {', '.join(names)}")
        return f"nbd+unix:///{quote(name)}?socket={quote(str(self.directory / 'nbd'))}"

    async def start(self) -> None:
        """Start it, again after `kill`, at the same place.

        :raise ToolError: it is not here, or it ended; what it said is inside.
        :raise StalledError: it did not answer.
        """
        self._loop = running_loop("a storage daemon")
        for name in ("nbd", "qmp", "control"):
            (self.directory / name).unlink(missing_ok=True)
        command = self._command()
        with (self.directory / "stderr").open("wb") as err:
            self._process = subprocess.Popen(  # noqa: ASYNC220 - fork and exec are quick
                command,
                stdin=subprocess.DEVNULL,
                stdout=err,
                stderr=err,
                process_group=0,  # Ctrl-C is for the test run
                preexec_fn=die_with_parent(),
            )
        deadline = asyncio.get_running_loop().time() + _START_LIMIT
        while self._control is None:
            if (code := self._process.poll()) is not None:
                raise ToolError(command, code, self.stderr)
            if asyncio.get_running_loop().time() > deadline:
                raise StalledError(f"{self._name()} did not answer for {_START_LIMIT:g} s")
            try:
                path = str(self.directory / "control")
                self._control = await Monitor.connect(path, greeting_timeout=_START_LIMIT)
            except ConnectError:  # bound, not yet listening
                await asyncio.sleep(_POLL)
            except GreetingError:
                if not await self._ended_soon():
                    raise

    async def _ended_soon(self) -> bool:
        """Whether it is ending: then its own words say why."""
        assert self._process is not None  # start() made it
        try:
            await asyncio.to_thread(self._process.wait, 1.0)
        except subprocess.TimeoutExpired:
            return False
        return True

    def _name(self) -> str:
        return Path(self._program or "qemu-storage-daemon").name

    def _command(self) -> list[str]:
        beside = Path(find_qemu()).resolve().parent
        wanted = self._program or "qemu-storage-daemon"
        program = shutil.which(wanted, path=str(beside)) or shutil.which(wanted)
        if program is None:
            raise ToolError([wanted], 127, "no such program", remedy="install qemu-storage-daemon")
        command = [program]
        for name in ("control", "qmp"):
            path = self.directory / name
            command += ["--chardev", f"socket,id={name},path={path},server=on,wait=off"]
            command += ["--monitor", f"chardev={name}"]
        socket = {"type": "unix", "path": str(self.directory / "nbd")}
        command += ["--nbd-server", json.dumps({"addr": socket})]
        for disk in self._disks:
            name = disk.spec.name
            command += served_arguments(disk, writable=self._writable)
            export: dict[str, object] = {
                "type": "nbd",
                "id": name,
                "node-name": name,
                "name": name,
                "writable": self._writable,
                "allocation-depth": True,
            }
            if name in self._bitmaps:
                export["bitmaps"] = list(self._bitmaps[name])
            command += ["--export", json.dumps(export)]
        return command

    async def execute(self, command: str, **arguments: object) -> Any:
        """Run a QMP command; `_` in the names of arguments stands for `-`.

        :raise CommandError: it refused.
        :raise WrongLoopError: in another event loop than where it was started.
        """
        check_loop(self._loop, "this storage daemon")
        assert self._control is not None, "not started"
        given = {name.replace("_", "-"): value for name, value in arguments.items()}
        return await self._control.execute(command, given or None)

    def pause(self) -> None:
        """Have it hang (SIGSTOP): it keeps its connections and answers nothing."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on (SIGCONT)."""
        os.kill(self.pid, signal.SIGCONT)

    async def kill(self) -> None:
        """End it with SIGKILL; its clients see the connection close. `start` may follow."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            await asyncio.to_thread(self._process.wait, _END_LIMIT)
        control, self._control = self._control, None
        if control is not None:
            await control.close()

    async def close(self) -> None:
        """End it and remove its directory. Idempotent."""
        if self._process is not None and self._process.poll() is None:
            self.resume()  # a stopped process ends by SIGKILL alone
            self._process.terminate()
            try:
                await asyncio.to_thread(self._process.wait, _END_LIMIT)
            except subprocess.TimeoutExpired:
                self._process.kill()
        await self.kill()
        remove(self.directory)

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self._process is not None, "not started"
        return self._process.pid

    @property
    def stderr(self) -> str:
        """What it has printed."""
        path = self.directory / "stderr"
        return path.read_text(errors="replace") if path.exists() else ""
