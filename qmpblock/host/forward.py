"""Forward: an ssh of ours that brings the sockets of a VM on another host to this one.

One ssh for all of them (`ssh -N -L HERE:THERE -L ...`), which asks nothing: who may log in, by
which key, and by which hosts, is what the user's configuration of ssh says. Here each socket lies
in a directory of its own that is this user's alone; there, beside the VM's monitor, where its QEMU
can make sockets, and nobody gets in who could not get at the monitor.

It is ours to end: then whatever went through it is cut, which nothing inside QEMU can be relied
upon for. If this process dies, the kernel ends it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qmpblock.address import LONGEST_PATH, SSHAddress, UnixAddress
from qmpblock.errors import UNTOUCHED, ConnectError, RequestError, printable
from qmpblock.host.processes import die_with_parent, kill_group
from qmpblock.host.socketfolder import SocketFolder
from qmpblock.names import forward_folder, forwarded_socket, new_run

__all__ = ["Forward", "Forwarded"]

_UP = 30.0  # seconds until ssh has logged in and listens
_POLL = 0.02
_END = 2.0  # seconds for ssh to end when it is told to
_LONGEST = 4096  # bytes of its last words that are kept
#: What holds whatever the user's configuration says. Of a peer that is silent for half a minute
#: the connection ends; a monitor, a mirror or a stream that may not wait so long is cut before.
_OPTIONS = (
    "BatchMode=yes",
    "ExitOnForwardFailure=yes",
    "ControlMaster=no",
    "ControlPath=none",
    "ForwardAgent=no",
    "ForwardX11=no",
    "PermitLocalCommand=no",
    "RemoteCommand=none",
    "Tunnel=no",
    "ConnectTimeout=10",
    "ServerAliveInterval=10",
    "ServerAliveCountMax=3",
)


@dataclass(frozen=True)
class Forwarded:
    """A socket: the way to it here, and its path on the other host."""

    here: UnixAddress
    there: str


class Forward:
    """The ssh to one VM's host. Made by `open`; `close` ends it.

    Of the three sockets only the monitor's is there; the others are for the VM to make.
    """

    def __init__(self, address: SSHAddress) -> None:
        run = new_run()
        whats = ("monitor", "nbd", "stream")
        self._folders = [SocketFolder(forward_folder(run, what)) for what in whats]
        self._here: list[int] = []  # descriptors of the sockets
        self._there = (
            address.path,
            *(forwarded_socket(address.path, run, what) for what in whats[1:]),
        )
        self._address = address
        self._process: asyncio.subprocess.Process | None = None
        self._listening: asyncio.Task[None] | None = None
        self._words = b""

    @classmethod
    async def open(cls, address: SSHAddress) -> Forward:
        """Start it, and wait until it has logged in.

        :raise RequestError: the monitor's directory has a name that leaves no room for sockets.
        :raise ConnectError: ssh cannot, in its own words; nothing is left.
        """
        longest = max(cls(address)._there, key=len)
        if len(longest) > LONGEST_PATH:
            raise RequestError(
                f"beside the monitor {address} there is no room for sockets: {longest} is longer "
                f"than {LONGEST_PATH} bytes",
                standing=UNTOUCHED,
                remedy="name the monitor by a shorter path (a symbolic link to its directory)",
            )
        forward = cls(address)
        try:
            await forward._start()
        except BaseException:
            await forward.close()
            raise
        return forward

    @property
    def monitor(self) -> Forwarded:
        """The way to the VM's monitor."""
        return self._forwarded(0)

    @property
    def nbd(self) -> Forwarded:
        """The way to an NBD server that the VM is to start."""
        return self._forwarded(1)

    @property
    def stream(self) -> Forwarded:
        """The way to where the VM is to wait for a migration."""
        return self._forwarded(2)

    def _forwarded(self, number: int) -> Forwarded:
        """Name it by the descriptor, which leads to that very socket."""
        here = UnixAddress(f"/proc/self/fd/{self._here[number]}")
        return Forwarded(here, self._there[number])

    @property
    def pid(self) -> int:
        """The ssh's process."""
        assert self._process is not None  # open() started it
        return self._process.pid

    @property
    def said(self) -> str:
        """What ssh printed last; empty where it printed nothing."""
        lines = self._words.decode(errors="replace").split("\n")
        return "; ".join(printable(line.strip()) for line in lines[-4:] if line.strip())

    @property
    def ended(self) -> bool:
        """Whether ssh has ended: nothing goes through any more."""
        return self._process is not None and self._process.returncode is not None

    # -- its life

    def _words_to_start(self) -> list[str]:
        words = ["-N"]
        for folder, there in zip(self._folders, self._there, strict=True):
            words += ["-L", f"{folder.socket}:{there}"]
        return self._ssh(words)

    def command(self, words: Sequence[str]) -> list[str]:
        """Return what runs a command there: by an ssh of its own, as the same user."""
        return [*self._ssh(["-o", "ClearAllForwardings=yes"]), shlex.join(words)]

    def _ssh(self, more: Sequence[str]) -> list[str]:
        words = ["ssh", "-T"]
        for option in _OPTIONS:
            words += ["-o", option]
        words += more
        if self._address.user is not None:
            words += ["-l", self._address.user]
        if self._address.port is not None:
            words += ["-p", str(self._address.port)]
        return [*words, "--", self._address.host]

    async def _start(self) -> None:
        try:
            for folder in self._folders:
                folder.make()
            self._process = await asyncio.create_subprocess_exec(
                *self._words_to_start(),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
                start_new_session=True,  # Ctrl-C is ours: its wire is needed for the way back
                preexec_fn=die_with_parent(),
            )
        except FileNotFoundError as error:
            what = "there is no ssh in PATH" if error.filename == "ssh" else str(error)
            raise self._failed(what) from None
        except OSError as error:
            raise self._failed(f"{error.filename}: {error.strerror}") from None
        self._listening = asyncio.create_task(self._listen(self._process))
        deadline = asyncio.get_running_loop().time() + _UP
        while not all(Path(folder.address().path).exists() for folder in self._folders):
            if self._process.returncode is not None:
                await self._listening
                raise self._failed(self.said or "ssh has ended without a word")
            if asyncio.get_running_loop().time() > deadline:
                raise self._failed(f"ssh has not logged in within {_UP:g} s")
            await asyncio.sleep(_POLL)
        for folder in self._folders:
            self._here.append(os.open(folder.address().path, os.O_PATH | os.O_CLOEXEC))
            folder.remove()

    def _failed(self, why: str) -> ConnectError:
        user = f"{self._address.user}@" if self._address.user is not None else ""
        port = f" -p {self._address.port}" if self._address.port is not None else ""
        return ConnectError(
            f"cannot reach {self._address}: {why}",
            remedy="see that this works, and asks nothing: ssh -o BatchMode=yes"
            f"{port} {user}{self._address.host} true",
        )

    async def _listen(self, process: asyncio.subprocess.Process) -> None:
        assert process.stderr is not None  # it is a pipe
        while words := await process.stderr.read(_LONGEST):
            self._words = (self._words + words)[-_LONGEST:]
        await process.wait()

    async def close(self) -> None:
        """End it: what went through it is cut. Idempotent."""
        if self._process is not None and self._listening is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.terminate()
            await asyncio.wait([self._listening], timeout=_END)
            if not self._listening.done():  # it hangs, or its own way there does (ProxyJump)
                kill_group(self._process)
            await self._listening
        for folder in self._folders:
            folder.remove()
        while self._here:
            os.close(self._here.pop())
