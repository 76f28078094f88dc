"""A target that is a block device of this host: its content is overwritten, from the first byte on.

A qcow2 image there is one as in a file, but that it cannot grow beyond the device: so that has to
have the room of all of the disk, and of the tables.

It is ours alone while it is copied to: opened with O_EXCL, by which nobody can mount it, or build
anything on it, and which fails where somebody has. A VM that uses it claims nothing, and QEMU puts
no locks on block devices (7.2, 11.1): so whoever has it open is looked for before. Nothing of it is
removed where the copy fails: what was there before is gone by then.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import posixpath
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qmpblock.chains.headers import Header, make
from qmpblock.copying.copytarget import Left, LocalTarget
from qmpblock.copying.plan import CopyPlan
from qmpblock.copying.target import PathTarget, path_node
from qmpblock.errors import (
    UNTOUCHED,
    Error,
    GraphError,
    InUseError,
    RequestError,
    UnsupportedError,
    printable,
)
from qmpblock.graph.places import FileId
from qmpblock.host.openfiles import OpenFiles, openers, sees_directory
from qmpblock.names import storage_node

if TYPE_CHECKING:
    from qmpblock.qemu.connection import Connection

__all__ = ["DeviceTarget", "check_unused", "claimed", "is_block_device"]

_LOOKS = 4  # at who has it open: udev looks at each device for a moment, once that has changed
_PAUSE = 0.3  # seconds between them
_HEADER = 512  # bytes, of an image that is none any more


@dataclass
class DeviceTarget(LocalTarget):
    """One target, from its opening to its end. See `CopyTarget`.

    :ivar fd: by which it is ours.
    """

    plan: CopyPlan
    node: str
    fd: int
    source: str = ""
    told_by: tuple[str, ...] = ()
    bitmap: str = ""
    resumed: bool = False
    left: Left | None = None
    keeps: bool = False

    @property
    def path(self) -> str:
        """Its own."""
        return self.plan.file

    async def make(self, vm: Connection, record: Callable[[FileId], None]) -> None:
        """Write the tables of an empty image there, where there is to be one.

        :raise Error: it cannot be written to.
        """
        if self.plan.format == "raw":
            return
        contents = await make(vm, Header(self.plan.format, self.plan.size, **self._header))
        try:
            await asyncio.to_thread(contents.write_over, self.fd)
        except OSError as error:
            raise Error(f"cannot write to {printable(self.path)}: {error.strerror}") from None

    @property
    def _header(self) -> dict[str, Any]:
        return {"cluster": self.plan.shape.unit, "key_secret": self.plan.secret}

    async def open(self, vm: Connection) -> None:
        """Have QEMU open the image there, or see as much of it as the disk has.

        :raise GraphError: QEMU has opened another one.
        """
        storage = storage_node(self.node)
        shape = self.plan.shape
        path = PathTarget(self.path)
        settings = shape.while_copying(of_view=bool(self.source))
        options = path_node(
            path, storage, block_device=True, direct=shape.direct, discard=settings.discard
        )
        await vm.monitor.execute("blockdev-add", options)
        files = OpenFiles(vm.monitor.peer_pid)
        if files.blind is None and FileId.of(os.fstat(self.fd)) not in files.ids():
            raise GraphError(f"QEMU has opened another {printable(self.path)} than is meant")
        fmt = self.plan.format
        above: dict[str, Any] = {"driver": fmt, "node-name": self.node, "file": storage}
        if fmt == "raw":
            above["size"] = self.plan.size
        elif self.plan.secret is not None:
            above["encrypt"] = {"format": "luks", "key-secret": self.plan.secret}
        await vm.monitor.execute("blockdev-add", above | settings.options)

    def look_into(self) -> int:
        """Return another descriptor of the device, to read it; by this one it is not ours.

        :raise OSError: it cannot be opened.
        """
        return os.open(f"/proc/self/fd/{self.fd}", os.O_RDONLY | os.O_CLOEXEC)

    async def finish(self, vm: Connection) -> None:
        """Have it on stable storage; by a descriptor that was open all the while, no error is lost.

        :raise Error: it is not certain that it is.
        """
        try:
            await asyncio.to_thread(os.fsync, self.fd)
        except OSError as error:
            raise Error(
                f"the copy {printable(self.path)} cannot be brought to stable storage: "
                f"{error.strerror}",
                standing="what was written there is no copy",
            ) from None

    async def remove(self) -> str | None:
        """Have nothing there that looks like an image; what it held before is gone."""
        if self.plan.format != "raw":
            with contextlib.suppress(OSError):
                os.pwrite(self.fd, bytes(_HEADER), 0)
                os.fsync(self.fd)
        return self.path if self.keeps and self.plan.can_be_resumed else None


def is_block_device(file: str) -> bool:
    """Whether a path leads to one."""
    with contextlib.suppress(OSError):  # it cannot be looked at: then it cannot be one, either
        return Path(file).is_block_device()
    return False


async def check_unused(pid: int | None, file: str) -> None:
    """Refuse a block device that any process that can be seen from here has open.

    :param pid: of the VM.
    :raise InUseError: one has; names it.
    """
    device = FileId.of(await asyncio.to_thread(os.stat, file))
    assert device is not None  # it is a block device
    users: list[int] = []
    for look in range(_LOOKS):
        if look:
            await asyncio.sleep(_PAUSE)
        users = await asyncio.to_thread(openers, device)
        if not users:
            return
    who = "the VM itself" if pid in users else f"process {', '.join(map(str, users))}"
    raise InUseError(
        f"{printable(file)} is open in {who}",
        standing=UNTOUCHED,
        remedy="name another target, or end what uses it",
    )


@contextmanager
def claimed(pid: int | None, plan: CopyPlan, *, force: bool) -> Iterator[int]:
    """Have a block device for this process alone, while this lasts; nothing is written.

    :param pid: of QEMU, which is to have it, too.
    :param force: whether its content may be overwritten.
    :return: a descriptor.
    :raise InUseError: somebody has it mounted, or built something on it.
    :raise RequestError: it is too small, or must not be overwritten.
    :raise UnsupportedError: QEMU does not see that directory.
    :raise Error: it cannot be opened.
    """
    elsewhere = sees_directory(pid, posixpath.dirname(plan.file))
    if elsewhere is not None:
        raise UnsupportedError(
            f"the VM is to write to {printable(plan.file)}, whose directory {elsewhere}",
            standing=UNTOUCHED,
            remedy="run qmpblock on the VM's host, by a UNIX monitor, as root or the VM's user, "
            "and let the VM see that device",
        )
    try:
        fd = os.open(plan.file, os.O_RDWR | os.O_EXCL | os.O_CLOEXEC)
    except OSError as error:
        raise _cannot_open(plan.file, error) from None
    try:
        _check(plan, fd, force=force)
        yield fd
    finally:
        os.close(fd)


def _check(plan: CopyPlan, fd: int, *, force: bool) -> None:
    there = os.lseek(fd, 0, os.SEEK_END)
    if not stat.S_ISBLK(os.fstat(fd).st_mode):
        raise RequestError(f"{printable(plan.file)} was a block device a moment ago")
    wanted = plan.size if plan.format == "raw" else plan.shape.room(plan.format, plan.size)
    if there < wanted:
        tables = "" if plan.format == "raw" else f", which takes {wanted} in a qcow2 image"
        raise RequestError(
            f"{printable(plan.file)} has {there} bytes, and {plan.device.name} {plan.size}{tables}",
            standing=UNTOUCHED,
            remedy=f"take one of at least {wanted} bytes; of more, the rest is left as it is",
        )
    if not force:
        raise RequestError(
            f"{printable(plan.file)} is a block device, whose content would be overwritten",
            standing=UNTOUCHED,
            remedy="look whether it is the right one, then add --force",
        )


def _cannot_open(file: str, error: OSError) -> Error:
    if error.errno == errno.EBUSY:
        return InUseError(
            f"{printable(file)} is in use on this host: mounted, or part of something else",
            standing=UNTOUCHED,
            remedy=f"look what uses it (lsblk {printable(file)}), or name another target",
        )
    return Error(f"cannot open {printable(file)}: {error.strerror}", standing=UNTOUCHED)
