"""Fleecing: disks are seen as they were at one instant, while the guest goes on.

For each disk, by QEMU's own means::

    guest -> [throttle] -> filter -> what was there
                            ^   |
                         view   +-> kept           view: snapshot-access; filter: copy-before-write

What the guest writes goes through the filter, which first keeps what was there, where that has not
been kept yet; the view shows what is kept, and else what is there. The instant is the one at which
the filter comes into the guest's way; of several disks it is one, for no guest runs meanwhile.

*The guest never suffers.* Where what was there cannot be kept (there is no room, the storage fails
or takes longer than `PATIENCE`), the filter gives the point up, and not the write: from then on
whoever reads the view gets an error. So what is kept may be bounded: it is a qcow2 image inside a
`raw` node that does not grow (F24), so that QEMU itself ends it there, even if nobody of ours lives
any more.

Nothing that is made here outlives QEMU but the files of what is kept, which hold nothing that
anybody will miss. They are encrypted with the disk's own key where that is encrypted.
"""

from __future__ import annotations

import contextlib
import os
import posixpath
import stat
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qmpblock.cancellation import undisturbed
from qmpblock.chains.headers import Header, by_qemu_img, make
from qmpblock.chains.look import unless_changed
from qmpblock.chains.plan import check_idle, check_unchanged
from qmpblock.changes.change import Change
from qmpblock.changes.filters import Spot, put_filter, spot_in
from qmpblock.changes.identity import identify
from qmpblock.changes.leftovers import make_way
from qmpblock.changes.operations import PointInTime
from qmpblock.changes.record import Record
from qmpblock.changes.settle import settle
from qmpblock.changes.step import Choice
from qmpblock.copying.alone import check_alone
from qmpblock.copying.viewnode import UNIT, add_view
from qmpblock.errors import (
    UNTOUCHED,
    Error,
    GraphError,
    NoRoomError,
    RequestError,
    UnsupportedError,
    printable,
)
from qmpblock.graph.options import key_secret
from qmpblock.graph.places import FileId
from qmpblock.host.imagefiles import images_of, local_path, status_of
from qmpblock.host.openfiles import sees_directory
from qmpblock.host.ourfiles import Directory
from qmpblock.managers import Work
from qmpblock.names import fleecing_file, fleecing_nodes, lock_names, new_run, paused_node
from qmpblock.qemu import ownership
from qmpblock.qemu.instant import instant
from qmpblock.qemu.iothread import iothread_of
from qmpblock.sizes import human_size

if TYPE_CHECKING:
    from qmpblock.graph.model import BlockGraph, DiskDevice
    from qmpblock.host.contents import Contents
    from qmpblock.mapping import MappedDisk
    from qmpblock.qemu.connection import Connection

__all__ = ["PATIENCE", "Fleece", "Plan", "View", "fleecing", "planned", "take"]

PATIENCE = 5
"""Seconds for which a write of the guest's may wait for what was there to be kept; then the point
is given up. Never 0, by which QEMU means for ever."""

_FULL = 256 << 10  # bytes that are left of room in which no more than some clusters fit
_LEAST = 4 << 20  # bytes beside the header; less than some clusters make no sense
_LONGEST = 180  # bytes of an image's name in that of the file; a name has room for 255


@dataclass(frozen=True)
class Fleece:
    """Where what is kept goes, and how much of it.

    :ivar directory: on this host; None: beside the disk's active image.
    :ivar limit: bytes, for each disk; None: half of what is free there at the beginning, shared by
        the disks.
    """

    directory: str | os.PathLike[str] | None = None
    limit: int | None = None


@dataclass(frozen=True)
class View:
    """One disk as it was.

    :ivar node: by which QEMU reads it: of a job, or an export (`qmpblock.copying.viewnode`).
    :ivar size: of the disk, in bytes.
    :ivar kept: the file of what is kept.
    """

    node: str
    size: int
    kept: str


@dataclass(frozen=True)
class _Item:
    """What is to be made for one disk.

    :ivar kept: the file; at most `limit` bytes of it are used.
    :ivar key_secret: the id of the secret object that encrypts it.
    :ivar directory: in which it is made.
    """

    device: DiskDevice
    spot: Spot
    nodes: tuple[str, str, str]
    kept: str
    limit: int
    key_secret: str | None
    contents: Contents
    directory: Directory | None = None


@dataclass(frozen=True)
class Plan:
    """What is to be made for several disks, by one run; nothing is touched yet."""

    run: str
    items: tuple[_Item, ...]

    def without_room(self) -> str | None:
        """Say which files of what is kept have no room any more; None where all have.

        QEMU's own word for it is what a job finds that reads a point which was given up.
        """
        full = [printable(item.kept) for item in self.items if _is_full(item)]
        return (
            f"what the guest overwrote had no room any more in {', '.join(full)}" if full else None
        )

    def changed_in(self, graph: BlockGraph) -> str | None:
        """Say of which disks somebody has changed the chain meanwhile; None: of none.

        A snapshot takes the place of the filter for whoever reads the view, too.
        """
        filters = {
            device.qom_path: [node.name for node in device.chain.filters]
            for device in graph.devices
            if device.chain is not None
        }
        changed = [
            printable(item.device.name)
            for item in self.items
            if item.nodes[1] not in filters.get(item.device.qom_path, ())
        ]
        if not changed:
            return None
        return f"somebody else changed the chain of {', '.join(changed)} meanwhile"

    async def record_fields(self, vm: Connection) -> dict[str, Any]:
        """Return what the record of the change says of it, as fields of `Record`.

        The record's class is one of those that undo it (`qmpblock.changes.operations`).
        """
        devices = [item.device for item in self.items]
        return {
            "run": self.run,
            "vm": await identify(vm),
            "devices": tuple(device.qom_path for device in devices),
            "names": tuple(device.name for device in devices),
            "locks": lock_names(devices),
            "nodes": (*(one for item in self.items for one in item.nodes), paused_node(self.run)),
            "files": tuple(item.kept for item in self.items),
            "images": images_of(vm.monitor.peer_pid, [device.chain for device in devices]),
        }


@asynccontextmanager
async def fleecing(
    vm: Connection, disks: Sequence[MappedDisk], fleece: Fleece
) -> AsyncIterator[list[View]]:
    """Have disks seen as they were at one instant: that in which this is entered.

    Of several disks the VM is paused for it, for milliseconds. On leaving, by whatever way, all is
    as it was. Cancelling waits for that. What does more with the views, and has a record of its
    own, uses `planned` and `take`.

    :raise RequestError: no disk, or one twice, or too little room is given; nothing was touched.
    :raise UnsupportedError: this QEMU, or place, cannot, or not safely; nothing was touched.
    :raise NoRoomError: there is no room on the host.
    :raise BusyError: a job, or another controller, is at work on one of the disks; on leaving, an
        InUseError: somebody else reads a view.
    :raise GraphError: somebody else changed a disk at that moment.
    """
    async with planned(vm, disks, fleece) as plan:
        change = Change(vm, PointInTime(**await plan.record_fields(vm)))
        await change.begin()
        async with change.or_undo(lambda: "the disks are as they were; nothing of ours is left"):
            yield await take(vm, change, plan, told=True)
            await undisturbed(_end(change))


async def _end(change: Change[PointInTime]) -> None:
    await settle(change.vm, change.record, change.journal, Choice.UNDO)
    await change.end()


# -- what is to be


@asynccontextmanager
async def planned(
    vm: Connection, disks: Sequence[MappedDisk], fleece: Fleece, *, looked: bool = False
) -> AsyncIterator[Plan]:
    """Say what will be made, or refuse; only what a dead controller left is undone.

    :param looked: whether somebody has just looked at the disks, who changes them for whatever
        reason (`qmpblock.copying.look`): that is not done again. What has come of them since,
        `take` sees.
    :raise Error: as of `fleecing`, before anything is touched.
    """
    paths = [disk.device.qom_path for disk in disks]
    if not paths or len(set(paths)) < len(paths):
        raise RequestError("name the disks that are to be seen as they are now, each once")
    if not looked:
        await _look(vm, disks)
    run = new_run()
    with contextlib.ExitStack() as stack:
        items = []
        for number, disk in enumerate(disks):
            async with vm.unless_gone():
                item = await _item(vm, run, number, disk.device, fleece, len(paths))
            items.append(replace(item, directory=stack.enter_context(_directory(item))))
        yield Plan(run, tuple(items))


async def _look(vm: Connection, disks: Sequence[MappedDisk]) -> None:
    """See how the disks are now, and that they are ours to look into.

    :raise Error: they are not; nothing was touched.
    """
    devices = [disk.device for disk in disks]
    await ownership.ask(vm.monitor, devices)
    await make_way(vm, lock_names(devices))
    graph = await vm.graph()
    for disk in disks:
        disk.device = graph.device(disk.device.qom_path)
        await check_alone(vm.monitor, disk.device)
    await ownership.ask_for_change(vm, Work("point", disks[0].chain.active.file), graph)


async def _item(
    vm: Connection, run: str, number: int, device: DiskDevice, fleece: Fleece, disks: int
) -> _Item:
    check_idle(device)
    await _check_iothread(vm, device)
    secret = await _key_secret(vm, device)
    kept, size = _file(vm, run, number, device, fleece), device.chain.active.size
    contents = await make(vm, Header("qcow2", size, key_secret=secret))
    limit = _limit(kept, size, contents, fleece.limit, disks)
    nodes = fleecing_nodes(run, number)
    return _Item(device, spot_in(device), nodes, kept, limit, secret, contents)


async def _check_iothread(vm: Connection, device: DiskDevice) -> None:
    if not vm.capabilities.adding_over_iothreads_aborts:
        return
    iothreads = await vm.monitor.execute("query-iothreads")
    if await iothread_of(vm.monitor, device, iothreads) is not None:
        raise UnsupportedError(
            f"{device.name} runs in an iothread, and QEMU {vm.capabilities} aborts when a filter "
            "comes over such a disk while the guest is at work on it, or when an NBD client of it "
            "goes away",
            standing=UNTOUCHED,
            remedy="use QEMU 10.0 or newer, or give the disk no iothread",
        )


async def _key_secret(vm: Connection, device: DiskDevice) -> str | None:
    """Return the id of the secret object with which what is kept is encrypted; None for none.

    :raise UnsupportedError: it is to be, and cannot.
    """
    encrypted = [layer for layer in device.chain.layers if layer.node.encrypted]
    secret = key_secret(encrypted[0]) if encrypted else None
    if not await by_qemu_img(vm, secret, local=True):
        raise UnsupportedError(
            f"what {device.name} held cannot be kept: qemu-img cannot make an image for it here"
            + (" with the disk's key" if secret else ""),
            standing=UNTOUCHED,
            remedy="install qemu-img (Debian: qemu-utils)"
            + (", and run qmpblock as a user who may read the key" if secret else ""),
        )
    return secret


def _file(vm: Connection, run: str, number: int, device: DiskDevice, fleece: Fleece) -> str:
    """Choose the file of what is kept.

    :raise UnsupportedError: QEMU would not find it there.
    """
    pid, active = vm.monitor.peer_pid, device.chain.active
    image = local_path(pid, active)
    name = posixpath.basename(image or device.name).encode()[:_LONGEST].decode(errors="ignore")
    if fleece.directory is not None:
        place = str(Path(fleece.directory).resolve())
    elif image is not None:
        place = posixpath.dirname(os.path.realpath(image))
    else:
        raise UnsupportedError(
            f"{printable(active.file)} is no file on this host, so what {device.name} holds cannot "
            "be kept beside it",
            standing=UNTOUCHED,
            remedy="name a directory for it: fleece=DIRECTORY (--fleece DIRECTORY)",
        )
    elsewhere = sees_directory(pid, place)
    if elsewhere is not None:
        raise UnsupportedError(
            f"what {device.name} holds cannot be kept in {printable(place)}, which {elsewhere}",
            standing=UNTOUCHED,
            remedy="name a directory that is the same one for the VM and here",
        )
    return fleecing_file(posixpath.join(place, name), run, number)


def _limit(kept: str, size: int, contents: Contents, given: int | None, disks: int) -> int:
    """Return how many bytes of a file may be used; whole clusters.

    :raise RequestError: what is given does not suffice for anything.
    :raise NoRoomError: nor does what is free.
    """
    least = contents.length + _LEAST
    whole = least + size + (size >> 10)  # with all that maps it
    if given is not None:
        if given < least:
            raise RequestError(
                f"{human_size(given)} is too little to keep what a disk held: at least "
                f"{human_size(least)} for each"
            )
        return min(given - given % UNIT, whole + -whole % UNIT)
    place = posixpath.dirname(kept)
    found = os.statvfs(place)
    share = found.f_bavail * found.f_frsize // 2 // disks
    if share < least:
        raise NoRoomError(
            f"there is no room in {printable(place)} to keep what a disk held: half of what is "
            f"free is {human_size(share)} for each",
            standing=UNTOUCHED,
            remedy="make room there, or name another directory: fleece=DIRECTORY (--fleece)",
        )
    return min(share - share % UNIT, whole + -whole % UNIT)


# -- making it


async def take(
    vm: Connection, change: Change[Record], plan: Plan, *, told: bool = False
) -> list[View]:
    """Have the disks seen as they are now. A failure is for the change to undo.

    :param change: which has begun; its record has the plan's fields.
    :param told: whether others read the views, and go by what they are told of their holes.
    :raise GraphError: somebody else changed a disk meanwhile.
    :raise Error: as of `fleecing`.
    """
    graph = await vm.graph()  # again, now that no controller of ours can change the disks
    for item in plan.items:
        check_unchanged(graph, item.device)
    for item in plan.items:
        await _keep(vm, change, item)
    await ownership.ask(vm.monitor, [item.device for item in plan.items], standing=None)
    await undisturbed(_have_filters(vm, plan, told=told))
    return [View(one.nodes[0], one.device.chain.active.size, one.kept) for one in plan.items]


def _directory(item: _Item) -> Directory:
    try:
        return Directory(posixpath.dirname(item.kept))
    except OSError as error:
        raise _cannot_make(item, error) from None


async def _keep(vm: Connection, change: Change[Record], item: _Item) -> None:
    """Make the file of what is kept, and the filter, in nobody's way yet."""
    _make_file(vm, change, item)
    _, filter_, kept = item.nodes
    options: dict[str, Any] = {
        "driver": "qcow2",
        "node-name": kept,
        "backing": None,
        "cache": {"no-flush": True},  # nobody will miss it after a crash
        "file": {
            "driver": "raw",  # does not grow beyond `size`, which ends the point and not the guest
            "offset": 0,
            "size": item.limit,
            "file": {"driver": "file", "filename": item.kept},
        },
    }
    if item.key_secret is not None:
        options["encrypt"] = {"format": "luks", "key-secret": item.key_secret}
    await vm.monitor.execute("blockdev-add", options)
    await vm.monitor.execute(
        "blockdev-add",
        {
            "driver": "copy-before-write",
            "node-name": filter_,
            "file": item.spot.below,
            "target": kept,
            "on-cbw-error": "break-snapshot",
            "cbw-timeout": PATIENCE,
        },
    )


def _is_full(item: _Item) -> bool:
    try:
        taken, space = Path(item.kept).stat().st_blocks * 512, os.statvfs(item.kept)
    except OSError:
        return False  # it is gone, with the point
    return taken + _FULL > item.limit or space.f_bavail * space.f_frsize < _FULL


def _make_file(vm: Connection, change: Change[Record], item: _Item) -> None:
    """Make the file, owned as the image is, for nobody else to read."""
    assert change.journal is not None  # begin() wrote it
    assert item.directory is not None
    journal = change.journal
    like = status_of(vm.monitor.peer_pid, item.device.chain.active)

    def record(made: FileId) -> None:
        journal.add(made=item.kept, dev=made.device, ino=made.inode)

    def fill(fd: int) -> None:
        os.fchmod(fd, stat.S_IMODE(os.fstat(fd).st_mode) & 0o660)
        item.contents.write_to(fd)
        os.ftruncate(fd, item.limit)

    try:
        os.close(item.directory.make(Path(item.kept).name, record, fill, like=like))
    except OSError as error:
        raise _cannot_make(item, error) from None


def _cannot_make(item: _Item, error: OSError) -> Error:
    return Error(
        f"cannot make {printable(item.kept)}: {error.strerror}",
        remedy="name a directory that can be written to, and where there is room: "
        "fleece=DIRECTORY (--fleece)",
    )


async def _have_filters(vm: Connection, plan: Plan, *, told: bool) -> None:
    """Have the filters come into the guest's way, at one instant, then the views over them."""
    items = plan.items
    async with AsyncExitStack() as stack:
        if len(items) > 1:
            await stack.enter_async_context(instant(vm, paused_node(plan.run)))
        for item in items:
            async with unless_changed(vm, [item.device]):
                await put_filter(vm, item.spot, item.nodes[1])
    for item in items:
        # Only now: before, the guest's right to write was one that it does not share.
        chain = item.device.chain
        whole = told and len(chain.layers) > 1
        await add_view(vm, *item.nodes[:2], chain.active.size, whole=whole)
    graph = await vm.graph()
    for item in items:
        now = graph.device(item.device.qom_path)
        if item.nodes[1] not in [node.name for node in now.chain.filters]:
            raise GraphError(
                f"the filter did not come into the way of {item.device.name}: somebody else "
                "changed the disk at the same time"
            )
