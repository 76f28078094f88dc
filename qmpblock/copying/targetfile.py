"""A target that is a file on this host: made here, opened by QEMU, and marked until it is whole.

A copy bears the name TARGET.partial until all of it is on stable storage; then it is renamed, so
that whoever finds TARGET finds a whole one. Where the guest is to go over to it, it has its own
name from the start, for QEMU knows it by that from then on; it is removed where that fails.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import posixpath
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qmpblock.chains.headers import Header, make
from qmpblock.chains.settings import wanted_discard
from qmpblock.copying.copytarget import Left, LocalTarget
from qmpblock.copying.hostspace import space_of
from qmpblock.copying.plan import CopyPlan
from qmpblock.copying.shape import Settings
from qmpblock.copying.targetname import check_unopened
from qmpblock.errors import (
    Error,
    UnsupportedError,
    printable,
)
from qmpblock.graph.options import aio_of, cache_options, overlay_options
from qmpblock.graph.places import FileId
from qmpblock.host import imagefiles
from qmpblock.host.contents import Contents
from qmpblock.host.fallocate import UNSUPPORTED, keep_size, punch_hole
from qmpblock.host.imagechain import blockdev
from qmpblock.host.ourfiles import Directory
from qmpblock.host.processes import command_line
from qmpblock.host.qemuimg import Key, QemuImg
from qmpblock.host.qemuimgcheck import QemuImgCheck
from qmpblock.host.qemuio import QemuIo
from qmpblock.host.space import reserved_ranges, shared_ranges
from qmpblock.names import image_node, partial_file, storage_node
from qmpblock.qemu.keys import read_keys
from qmpblock.ranges import Ranges

if TYPE_CHECKING:
    from qmpblock.extents.allocationmap import AllocationMap
    from qmpblock.qemu.connection import Connection

__all__ = ["TargetFile"]

_STORED = "unmap"  # of an image's file, whose image knows better what may be discarded
_ALONE = 1 << 20  # bytes that an image has by itself: its tables


@dataclass
class TargetFile(LocalTarget):
    """One target, from its making to its name.

    :ivar node: what its node in QEMU is called.
    :ivar directory: in which it is made.
    :ivar keeps_name: whether it has its name from the start.
    :ivar source: the view that is copied; empty: the disk itself.
    :ivar backing_name: what it records of its backing image.
    :ivar replaces: whether what bears its name goes, and what another copy left unfinished.
    :ivar made: which file it is, once it is made; from the start where it is resumed.
    :ivar model: of the disk, with what is reserved, where the copy is to have host space like it.
    :ivar managed: whether a manager has QEMU open it, and copy: its zeros take host space away.
    :ivar warnings: once it is settled: what is worth acting on.
    """

    plan: CopyPlan
    node: str
    directory: Directory
    keeps_name: bool
    source: str = ""
    backing_name: str | None = None
    replaces: bool = False
    made: FileId | None = None
    told_by: tuple[str, ...] = ()
    bitmap: str = ""
    resumed: bool = False
    left: Left | None = None
    keeps: bool = False
    model: AllocationMap | None = None
    managed: bool = False
    warnings: tuple[str, ...] = ()
    _settled: bool = False

    @property
    def path(self) -> str:
        """By which QEMU opens it."""
        return self.plan.file if self.keeps_name else partial_file(self.plan.file)

    async def make(self, vm: Connection, record: Callable[[FileId], None]) -> None:
        """Make the file, an empty image of the disk's size; where it is resumed, it is there.

        :param record: is called with what it will be, before it has a name.
        :raise Error: it cannot be made; or somebody has replaced what is to be resumed.
        :raise InUseError: somebody has what it was to replace.
        """
        if self.resumed:
            await self._take_over(vm, record)
            return
        contents = Contents(self.plan.size, ())
        if self.plan.format != "raw":
            contents = await make(vm, self._header())

        def fill(fd: int) -> None:
            contents.write_to(fd)
            if self.plan.shape.allocation == "full" and contents.length:
                keep_size(fd, 0, contents.length)

        def note(made: FileId) -> None:
            self.made = made
            record(made)

        like = imagefiles.status_of(vm.monitor.peer_pid, self.plan.device.chain.active)
        name = posixpath.basename(self.path)
        try:
            if self.replaces and (left := self.directory.status(name)) is not None:
                check_unopened(self.path, left)
                os.unlink(name, dir_fd=self.directory.fd)
            os.close(self.directory.make(name, note, fill, like=like))
            self.directory.sync()
        except OSError as error:
            raise Error(f"cannot make {printable(self.path)}: {error.strerror}") from None

    async def _take_over(self, vm: Connection, record: Callable[[FileId], None]) -> None:
        """Look once more at what is resumed; a QEMU that was killed may have leaked clusters."""
        assert self.made is not None  # it was found
        path = partial_file(self.plan.file)
        name = posixpath.basename(path)
        if not self.directory.holds(name, self.made):
            raise Error(f"somebody has replaced {printable(path)} since it was looked at")
        if self.plan.format != "raw":
            await self._free_leaks(vm, path, self.made)
        if not self.keeps_name:
            return
        record(self.made)
        try:
            self.directory.rename(name, self.made, posixpath.basename(self.plan.file))
            self.directory.sync()
        except OSError as error:
            raise Error(
                f"cannot give {printable(path)} its name: {error.strerror}",
                standing=f"{printable(path)} is as it was",
            ) from None
        if self.plan.shape.allocation == "full" and self.plan.format != "raw":
            await self._store(vm, await self._lacking(vm, self._wanted))  # no guest is there yet

    async def _free_leaks(self, vm: Connection, path: str, made: FileId) -> None:
        keys: Sequence[Key] = ()
        if self.plan.secret is not None:
            try:
                keys = await read_keys(vm.monitor, self.plan.secret)
            except UnsupportedError as error:
                said = f"{printable(path)} may hold clusters that nothing uses: {error.message}"
                self.warnings = (*self.warnings, said)
                return
        await QemuImgCheck(stall=vm.stall).free_leaks(path, self.plan.format, made, keys)

    def _header(self) -> Header:
        backing, since = self.plan.backing, self.plan.since
        below = None if since is None else (since.file, since.format)
        if backing is not None:
            below = self.backing_name or backing.file, backing.format
        return Header(
            self.plan.format,
            self.plan.size,
            below,
            cluster=self.plan.shape.unit,
            preallocated=self.plan.shape.allocation == "full",
            key_secret=self.plan.secret,
        )

    async def open(self, vm: Connection, *, read_only: bool = False) -> None:
        """Have QEMU open it, for its jobs alone, or for the guest as its disk is open now.

        :param read_only: only to read what it holds.
        """
        active = self.plan.device.chain.active
        cache = cache_options(active.node) if self.keeps_name else self._cache
        storage: dict[str, Any] = {
            "driver": "file",
            "node-name": storage_node(self.node),
            "filename": self.path,
            "discard": "ignore" if self.plan.shape.allocation == "full" else _STORED,
            "cache": cache,
        }
        if self.keeps_name and active.storage is not None:
            aio = aio_of(command_line(vm.monitor.peer_pid), active.storage)
            if aio is not None:
                storage["aio"] = aio
        every = [storage, self._options(vm)]
        if self._shielded:
            every[1]["node-name"] = image_node(self.node)
            every.append({"driver": "raw", "node-name": self.node, "file": image_node(self.node)})
        for options in every:
            if read_only:
                options["read-only"] = True
            await vm.monitor.execute("blockdev-add", options)

    @property
    def _cache(self) -> dict[str, bool]:
        return {"direct": self.plan.shape.direct, "no-flush": False}

    def _options(self, vm: Connection) -> dict[str, Any]:
        backing = self.plan.backing
        options = overlay_options(
            self.node,
            storage_node(self.node),
            self.plan.device.chain.active.node,
            self.plan.secret,
            None if backing is None else backing.node.name,
            self.plan.format,
        )
        if self.plan.format == "raw":
            del options["backing"]
        if not self.keeps_name:
            options["cache"] = self._cache
        return options | self._while_copying(vm).options

    def _while_copying(self, vm: Connection) -> Settings:
        shape = self.plan.shape
        if self.keeps_name:
            return shape.while_moving(self._guests(vm), raw=self.plan.format == "raw")
        return shape.while_copying(of_view=bool(self.source))

    def _guests(self, vm: Connection) -> Settings:
        chain = self.plan.device.chain
        discard = wanted_discard(command_line(vm.monitor.peer_pid), chain) or "unmap"
        return Settings(discard, chain.active.node.detect_zeroes)

    def given_back(self, vm: Connection) -> tuple[tuple[str, str, str], ...]:
        """Return what its nodes are to have once the guest is there: see `Move.settings`."""
        guests, now = self._guests(vm), self._while_copying(vm)
        discard, zeroes = ("" if a == b else a for a, b in zip(guests, now, strict=True))
        image = (self.node, discard, zeroes)
        if self.plan.shape.allocation != "full":
            return (image,)
        return image, (storage_node(self.node), _STORED, "")

    @property
    def nodes(self) -> tuple[str, ...]:
        """Also its image, where jobs write to another node above it."""
        node, *below = super().nodes
        return node, *((image_node(node),) if self._shielded else ()), *below

    @property
    def _shielded(self) -> bool:
        """Whether jobs do not write to its image itself.

        A mirror has zeros take away what they are written to, whatever `discard` of the node to
        which it writes them says; that of the node below counts.
        """
        full = self.plan.shape.allocation == "full"
        return full and self.plan.format != "raw" and not self.source

    def look_into(self) -> int:
        """Return a descriptor of the file, to read it.

        :raise OSError: it cannot be opened; or it is not there any more.
        """
        assert self.made is not None  # make() went before
        return self.directory.open(posixpath.basename(self.path), self.made)

    async def remove(self) -> str | None:
        """Remove it, if it was made and is not worth to be gone on from; it never got its name."""
        if self.made is not None:
            with contextlib.suppress(OSError):
                name = posixpath.basename(self.path)
                if not self.keeps or self.keeps_name:
                    self.directory.remove(name, self.made)
                elif self.directory.holds(name, self.made) and self._is_there:
                    return self.path
        return None

    @property
    def left_over(self) -> str | None:
        """By which name there is what another copy can go on from, once it was given up."""
        path = partial_file(self.plan.file)
        there = self.made is not None and self.directory.holds(posixpath.basename(path), self.made)
        return path if there else None

    def check_place(self) -> None:
        """See that its path leads to it, by which it is said to be there, and started from.

        :raise Error: somebody has moved, removed or replaced it, or its directory.
        """
        if not self._is_there:
            raise Error(
                f"{printable(self.path)} is the copy no more: somebody has moved, removed or "
                "replaced it, or its directory, since it was made",
                remedy="copy again, to where nobody does",
            )

    @property
    def _is_there(self) -> bool:
        try:
            return self.made is not None and FileId.of(Path(self.path).stat()) == self.made
        except OSError:
            return False

    async def settle(self, vm: Connection) -> None:
        """Have it on stable storage, as it will stay.

        QEMU has closed it, or the guest is there, and it was flushed. Idempotent; `finish` does it,
        too.

        :raise Error: it cannot be, or not be given the host space that it is to have.
        """
        if self._settled:
            return
        if self._wanted and self.plan.format != "raw" and not self.keeps_name:
            await self._store(vm, await self._lacking(vm, self._wanted))
        await self._on_storage(self._settle)
        self._settled = True

    async def finish(self, vm: Connection) -> None:
        """Have it on stable storage, under its name.

        :raise Error: it cannot be; it is not marked as whole.
        """
        await self.settle(vm)
        await self._on_storage(self._finish)

    @property
    def _wanted(self) -> Ranges:
        """What is to have host space once all is copied, besides that."""
        if self.plan.shape.allocation == "full":  # it has, where it was made for this copy
            lost = self.resumed or self.managed
            return Ranges([(0, self.plan.size)]) if lost else Ranges()
        return Ranges() if self.model is None else space_of(self.model)

    async def _lacking(self, vm: Connection, wanted: Ranges) -> Ranges:
        """Return which clusters are to have host space, and have none."""
        image = blockdev(self.plan.format, self.path)
        seen = await QemuImg(stall=vm.stall).map(image, [self.plan.format], known=self._known)
        own, unit = seen.own(), self.plan.shape.unit
        lacking = wanted.align_out(unit, self.plan.size).difference(space_of(own))
        # Where nothing is in an overlay, zeros would hide what lies below it.
        return lacking if self.plan.backing is None else lacking.intersection(own.zeros())

    async def _store(self, vm: Connection, ranges: Ranges) -> None:
        if ranges:
            tool = QemuIo(stall=vm.stall)
            await tool.store_zeros(self.path, self.plan.format, ranges, known=self._known)

    @property
    def _known(self) -> list[tuple[int | None, int]]:
        assert self.made is not None  # make() went before
        assert self.made.inode is not None  # it is a file
        return [(self.made.device, self.made.inode)]

    async def _on_storage(self, act: Callable[[], None]) -> None:
        try:
            await asyncio.to_thread(act)
        except OSError as error:
            raise Error(
                f"the copy {printable(self.path)} cannot be brought to stable storage, or be given "
                f"its name: {error.strerror}",
            ) from None

    def _settle(self) -> None:
        self.check_place()
        assert self.made is not None  # make() went before
        name = posixpath.basename(self.path)
        fd = self.directory.open(name, self.made, os.O_RDWR)
        try:
            os.fsync(fd)
            if self.plan.format == "raw":
                if not self.keeps_name and self.plan.shape.allocation != "full":
                    _give_zeros_back(fd, self.plan.size)
                for start, stop in self._wanted:
                    keep_size(fd, start, stop - start)
                os.fsync(fd)
            if self.plan.shape.reflink:
                self._look_what_is_shared(fd)
        finally:
            os.close(fd)

    def _look_what_is_shared(self, fd: int) -> None:
        status = os.fstat(fd)
        seen, taken = shared_ranges(f"/proc/self/fd/{fd}", status.st_size), status.st_blocks * 512
        shared = 0 if seen is None else seen.total
        if 2 * shared < taken - _ALONE:
            name = printable(self.plan.file)
            words = "are shared with the disk's files"
            said = f"of the {taken} bytes of the copy {name}, {shared} {words}"
            self.warnings = (*self.warnings, said)

    def _finish(self) -> None:
        self.check_place()
        if not self.keeps_name:
            self._name()
        self.directory.sync()

    def _name(self) -> None:
        """Give it its name: instead of what bears that only where this is wanted."""
        name, final = posixpath.basename(self.path), posixpath.basename(self.plan.file)
        assert self.made is not None  # make() went before
        if not self.replaces:
            self.directory.rename(name, self.made, final)
            return
        if (there := self.directory.status(final)) is not None:
            check_unopened(self.plan.file, there, standing=None)
        self.directory.replace(name, self.made, final)


def _give_zeros_back(fd: int, size: int) -> None:
    """Take the blocks that hold nothing from a raw image, where the file system can tell and do so.

    A backup job writes zeros as ranges that are reserved and not written, and means no more by it.
    """
    for start, stop in reserved_ranges(f"/proc/self/fd/{fd}", size, sync=True) or ():
        try:
            punch_hole(fd, start, stop - start)
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
            return
