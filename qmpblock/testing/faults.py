"""Faults: what may go wrong under a VM, made to happen on purpose.

Image faults (`inject`, `slow`) are put below a built disk before QEMU starts, and apply in
the running VM only: qemu-img, which builds and compares, does not meet them.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Self

from qmpblock.errors import RequestError, StalledError, ToolError, UnsupportedError
from qmpblock.host.processes import die_with_parent
from qmpblock.testing.images import BuiltDisk
from qmpblock.testing.qemu import QemuProcess

__all__ = ["Controller", "fill_up", "inject", "slow", "small_file_system", "unplug"]

_ERRNO = {"EIO": 5, "ENOSPC": 28, "EINVAL": 22, "EPERM": 1, "EAGAIN": 11}
_STALL = 30.0  # seconds
_POLL = 0.005  # seconds


def inject(
    disk: BuiltDisk,
    event: str,
    error: Literal["EIO", "ENOSPC", "EINVAL", "EPERM", "EAGAIN"],
    *,
    layer: int = 0,
    offset: int | None = None,
    once: bool = False,
    iotype: Literal["read", "write", "write-zeroes", "discard", "flush", "block-status"]
    | None = None,
) -> BuiltDisk:
    """Return `disk` with an error injected into one of its files; several calls add up.

    :param event: blkdebug's name of when: `write_aio`, `read_aio`, `flush_to_disk`,
        `cluster_alloc`, `l2_update`, ... (QEMU docs, blkdebug); `none` is every request.
    :param layer: 0 is the active layer.
    :param offset: only requests over this byte *of the file*; None: any.
    :param once: only the first time.
    :param iotype: only these requests; None: reads, writes, write-zeroes, discards, flushes.
    :raise RequestError: there is no such layer, or the disk's nodes have no names.
    """
    rule: dict[str, Any] = {"event": event, "errno": _ERRNO[error], "once": once}
    if offset is not None:
        rule["sector"] = offset // 512
    if iotype is not None:
        rule["iotype"] = iotype
    layers = disk.active.chain()
    return _with_layer(disk, layer, faults=(*_layer(layers, layer).faults, rule))


def slow(disk: BuiltDisk, bytes_per_second: int, *, layer: int = 0) -> BuiltDisk:
    """Return `disk` with one of its files as slow as that; metadata counts, too.

    :raise RequestError: as in `inject`.
    """
    return _with_layer(disk, layer, slow=bytes_per_second)


def _layer(chain: Sequence[Any], layer: int) -> Any:
    if not 0 <= layer < len(chain):
        raise RequestError(f"the disk has layers 0 to {len(chain) - 1}, not {layer}")
    return chain[layer]


def _with_layer(disk: BuiltDisk, layer: int, **changes: Any) -> BuiltDisk:
    if not disk.spec.attach.node_names:
        raise RequestError("faults go below a -blockdev whose nodes have names")
    chain = disk.active.chain()
    changed = replace(_layer(chain, layer), **changes)
    for above in reversed(chain[:layer]):
        changed = replace(above, backing=changed)
    return replace(disk, active=changed)


@asynccontextmanager
async def small_file_system(directory: Path, size: int) -> AsyncIterator[Path]:
    """Mount a tmpfs of `size` bytes at `directory` (made if it is not there), for ENOSPC.

    It is detached at the end even where a QEMU still has files open in it; they go with it.

    :raise UnsupportedError: this user may not mount; the message is fit for a skip.
    """
    if os.geteuid() != 0:
        raise UnsupportedError("a full file system needs root: only root may mount a small one")
    directory.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size},mode=0700", "qmpblock", str(directory)]
    try:
        await _run(command)
    except (ToolError, FileNotFoundError) as error:
        raise UnsupportedError(f"a full file system needs a mount: {error}") from None
    try:
        yield directory
    finally:
        # Shielded: a cancelled test must not leave a mount behind.
        await asyncio.shield(_run(["umount", "--lazy", str(directory)]))


async def _run(command: Sequence[str]) -> None:
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE
    )
    _, err = await process.communicate()
    if process.returncode:
        raise ToolError(command, process.returncode, err.decode(errors="replace"))


def fill_up(directory: Path, leave: int = 0) -> Path:
    """Fill the file system of `directory` but for `leave` bytes; return the file that does.

    Remove the file to make room again.

    :raise RequestError: more than 1 GiB is free: it is no small file system.
    """
    free = os.statvfs(directory)
    fill = free.f_bavail * free.f_frsize - leave
    if fill > 1 << 30:
        raise RequestError(f"{directory} has {fill} bytes free; fill_up is for small ones")
    filler = directory / "filler"
    with filler.open("wb") as file:
        if fill > 0:
            os.posix_fallocate(file.fileno(), 0, fill)
    return filler


async def unplug(vm: QemuProcess, disk: BuiltDisk | str) -> None:
    """Take a disk's device away from the running guest, and wait until it is gone.

    scsi-hd goes at once. A PCI device asks the guest: the tiny guest grants it.

    :raise RequestError: the device has no id.
    :raise CommandError: QEMU refused.
    :raise StalledError: the guest did not let it go.
    """
    device = vm.disk(disk).spec.attach.id
    if device is None:
        raise RequestError("a device without an id cannot be unplugged")
    with vm.control.subscribe(
        "DEVICE_DELETED", match=lambda event: event["data"].get("device") == device
    ) as deleted:
        await vm.execute("device_del", id=device)
        if vm.guest is not None and vm.disk(disk).spec.attach.device == "virtio-blk":
            await vm.guest.eject()
        await deleted.get(_STALL)


class Controller:
    """A program that controls a VM from a process of its own, to be killed at a moment.

    `async with Controller(command, directory) as controller:` starts it and kills it at the end.
    It dies with the test run. Its output goes to files in `directory`.
    """

    def __init__(self, command: Sequence[str], directory: Path) -> None:
        self.command = tuple(command)
        self._files = (directory / "controller.out", directory / "controller.err")
        self._process: subprocess.Popen[bytes] | None = None

    async def __aenter__(self) -> Self:
        out, err = self._files
        with out.open("wb") as stdout, err.open("wb") as stderr:
            self._process = subprocess.Popen(  # noqa: ASYNC220 - fork and exec are quick
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                preexec_fn=die_with_parent(),
            )
        return self

    async def __aexit__(self, *_: object) -> None:
        self.kill()

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The process; only inside `async with`."""
        assert self._process is not None, "not started"
        return self._process

    @property
    def stdout(self) -> str:
        """What it has printed so far; also `stderr`."""
        return self._files[0].read_text(errors="replace")

    @property
    def stderr(self) -> str:
        """What it has printed on stderr so far."""
        return self._files[1].read_text(errors="replace")

    def kill(self, how: signal.Signals = signal.SIGKILL) -> int | None:
        """Send a signal; SIGKILL is waited for. Return the exit code, None while it runs."""
        if self.process.poll() is None:
            self.process.send_signal(how)
            if how == signal.SIGKILL:
                self.process.wait()
        return self.process.poll()

    async def wait(self, timeout: float = _STALL) -> int:
        """Wait until it has ended by itself; return its exit code.

        :raise StalledError: it still runs after `timeout` seconds.
        """
        await self._until(lambda: self.process.poll() is not None, "end", timeout)
        code = self.process.poll()
        assert code is not None  # it has ended
        return code

    async def wait_for_output(self, pattern: str, timeout: float = _STALL) -> None:
        """Wait until stdout or stderr has a match of a regular expression.

        :raise StalledError: there is none after `timeout` seconds.
        :raise ToolError: it ended without.
        """
        expression = re.compile(pattern)

        def seen() -> bool:
            ended = self.process.poll()
            if expression.search(self.stdout) or expression.search(self.stderr):
                return True
            if ended is not None:
                raise ToolError(self.command, ended, self.stderr)
            return False

        await self._until(seen, f"print {pattern!r}", timeout)

    async def _until(self, done: Any, what: str, timeout: float) -> None:
        deadline = asyncio.get_running_loop().time() + timeout
        while not done():
            if asyncio.get_running_loop().time() > deadline:
                raise StalledError(
                    f"{' '.join(self.command)} did not {what} for {timeout:g} s",
                    standing=f"stderr so far: {self.stderr[-2000:]}",
                )
            await asyncio.sleep(_POLL)
