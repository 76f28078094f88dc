"""Snapshot: overlays over the active layers of one or several disks, at one point in time.

How one is made is in `qmpblock.chains.overlay`.
"""

from __future__ import annotations

import contextlib
import os
import posixpath
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from qmpblock.cancellation import undisturbed
from qmpblock.chains.overlay import Item, open_directory
from qmpblock.chains.owner import Owner, owner_of
from qmpblock.chains.plan import plan_snapshot
from qmpblock.chains.settings import lost_by_snapshot, wanted_discard
from qmpblock.changes.change import Change
from qmpblock.changes.identity import identify
from qmpblock.changes.leftovers import make_way
from qmpblock.changes.operations import Snapshot
from qmpblock.changes.settle import settle
from qmpblock.changes.step import Choice
from qmpblock.errors import (
    UNTOUCHED,
    DisconnectedError,
    GraphError,
    RequestError,
    printable,
)
from qmpblock.graph.backingname import name_of_frozen
from qmpblock.graph.openings import storage_of
from qmpblock.graph.places import known
from qmpblock.host.imagefiles import images_of
from qmpblock.host.openfiles import NOWHERE, OpenFiles, sees_directory
from qmpblock.host.processes import command_line
from qmpblock.managers import Work
from qmpblock.names import create_job, lock_names, new_run, overlay_node, storage_node
from qmpblock.qemu import ownership
from qmpblock.qemu.threshold import is_watched

if TYPE_CHECKING:
    from qmpblock.mapping import MappedDisk
    from qmpblock.qemu.connection import Connection

__all__ = [
    "Overlay",
    "SnapshotResult",
    "snapshot",
]

DiskT = TypeVar("DiskT", bound="MappedDisk")


@dataclass(frozen=True)
class Overlay:
    """One overlay of a snapshot.

    :ivar disk: what people call the disk.
    :ivar file: the overlay; from now on the active layer.
    :ivar node: its node in QEMU.
    :ivar frozen: the image that was the active layer, and holds the point in time.
    :ivar backing_name: what the overlay records as its backing file.
    """

    disk: str
    file: str
    node: str
    frozen: str
    backing_name: str


@dataclass(frozen=True)
class SnapshotResult:
    """What a snapshot made.

    :ivar warnings: what is worth acting on: dirty bitmaps that do not go on.
    """

    overlays: tuple[Overlay, ...]
    seconds: float
    warnings: tuple[str, ...]


async def snapshot(
    vm: Connection,
    overlays: Mapping[DiskT, str | os.PathLike[str]],
    *,
    format: str = "qcow2",  # noqa: A002 - the command's word
    backing_name: Literal["relative", "absolute"] = "relative",
) -> SnapshotResult:
    """Take a snapshot of several disks at one point. See `VM.snapshot`."""
    started = time.monotonic()
    if not overlays:
        raise RequestError("a snapshot of no disk is none")
    await ownership.ask(vm.monitor, [disk.device for disk in overlays])
    await make_way(vm, lock_names([disk.device for disk in overlays]))
    run = new_run()
    plan = partial(_plan, vm, run, overlays, format, backing_name)
    async with vm.unless_gone():
        items = await plan()
    owner = await owner_of(vm, Work("snapshot", items[0].plan.active.file))
    await owner.check(items, format)
    record = await _record(vm, run, items, owner)
    with contextlib.ExitStack() as stack:
        items = [
            replace(item, directory=stack.enter_context(open_directory(item.file)))
            if item.local
            else item
            for item in items
        ]
        await _take(vm, owner, record, items, format, plan)
    await _look_again(overlays, items)
    return SnapshotResult(
        tuple(
            _overlay(item, owner.node(item, disk.chain))
            for item, disk in zip(items, overlays, strict=True)
        ),
        time.monotonic() - started,
        tuple(warning for item in items for warning in item.plan.warnings),
    )


async def _record(vm: Connection, run: str, items: list[Item], owner: Owner) -> Snapshot:
    devices = [item.plan.device for item in items]
    record = Snapshot(
        run=run,
        vm=await identify(vm),
        devices=tuple(device.qom_path for device in devices),
        names=tuple(device.name for device in devices),
        locks=lock_names(devices),
        helpers=tuple(item.job for item in items),
        nodes=tuple(name for item in items for name in owner.nodes(item)),
        files=tuple(item.file for item in items),
        images=images_of(vm.monitor.peer_pid, [device.chain for device in devices]),
    )
    return owner.record(record, items)


async def _take(
    vm: Connection,
    owner: Owner,
    record: Snapshot,
    items: list[Item],
    fmt: str,
    plan: Callable[[], Awaitable[list[Item]]],
) -> None:
    """Make the overlays and have the guest go on in them, or leave all as it was.

    :param plan: looks again, under the locks, what would be made.
    """
    change = Change(vm, record)
    await change.begin()
    async with change.or_undo(
        lambda: _not_taken(items),
        done=lambda: "the snapshot was taken all the same",
    ):
        _unchanged(items, await plan())
        for item in items:
            await owner.make(change, item, fmt)
        await owner.prove(change, items)
        await ownership.ask(vm.monitor, [item.plan.device for item in items], standing=None)
        await undisturbed(owner.take(items))
        graph = await undisturbed(settle(vm, record, change.journal, Choice.CONTINUE))
        await undisturbed(owner.agree(change, items, graph))
        await undisturbed(change.end())


async def _look_again(disks: Iterable[DiskT], items: list[Item]) -> None:
    """Have the disks see their new chains.

    :raise DisconnectedError: the connection is lost; the snapshot was taken.
    """
    try:
        for disk in disks:
            await disk.refresh()
    except DisconnectedError as error:
        # The change has ended, and other controllers may build on it: only words are left.
        files = ", ".join(printable(item.file) for item in items)
        error.standing = (
            "the snapshot was taken. If QEMU has ended, "
            f"start the VM from {files}: there the guest went on"
        )
        raise


def _overlay(item: Item, node: str) -> Overlay:
    plan = item.plan
    return Overlay(plan.device.name, item.file, node, plan.active.file, item.backing_name)


async def _plan(
    vm: Connection,
    run: str,
    overlays: Mapping[DiskT, str | os.PathLike[str]],
    fmt: str,
    naming: str,
) -> list[Item]:
    """Say what will be made, or refuse; nothing is touched."""
    graph = await vm.graph()
    pid = vm.monitor.peer_pid
    places = OpenFiles(pid).places(graph.nodes.values())
    command = command_line(pid)
    items: list[Item] = []
    for number, (disk, wanted) in enumerate(overlays.items()):
        device = graph.device(disk.device.qom_path)
        plan = plan_snapshot(graph, device, fmt)
        lost = lost_by_snapshot(command, device, watched=await is_watched(vm, device))
        plan = replace(plan, warnings=(*plan.warnings, *lost))
        file, local = _overlay_path(pid, wanted)
        if any(item.file == file for item in items):
            raise RequestError(f"{printable(file)} is named for two disks")
        if any(item.plan.device.qom_path == device.qom_path for item in items):
            raise RequestError(f"{device.name} is named twice")
        unseen = known(places, storage_of(plan.active)) is None
        directory = os.path.realpath(posixpath.dirname(file)) if local or unseen else None
        node = overlay_node(run, number)
        items.append(
            Item(
                plan,
                file,
                node,
                storage_node(node),
                create_job(run, number),
                name_of_frozen(plan.active, places, directory, relative=naming != "absolute"),
                local=local,
                discard=wanted_discard(command, device.chain) or "unmap",
            )
        )
    for item in items:
        if item.local and os.path.lexists(item.file):
            raise RequestError(
                f"{printable(item.file)} exists already; an overlay is always a new file",
                standing=UNTOUCHED,
            )
    return items


def _not_taken(items: list[Item]) -> str:
    text = "no snapshot was taken; nothing of ours is left"
    if all(item.local for item in items):
        return text
    files = ", ".join(printable(item.file) for item in items if not item.local)
    return f"{text} in the VM; if {files} is on its host now, it is to be removed there"


def _unchanged(before: list[Item], now: list[Item]) -> None:
    names = [[one.plan.active.node.name for one in items] for items in (before, now)]
    if names[0] != names[1]:
        raise GraphError("a chain has just been changed by somebody else; try again")


def _overlay_path(pid: int | None, wanted: str | os.PathLike[str]) -> tuple[str, bool]:
    """Return the path of an overlay, and whether it is made here: else QEMU makes it."""
    file = os.fspath(wanted)
    if not file or "\0" in file or "://" in file or file.startswith("json:"):
        raise RequestError(f"{printable(repr(file))} is not the path of a file")
    # Without resolving links: the name is the user's.
    full = os.path.normpath(Path.cwd() / file)
    elsewhere = sees_directory(pid, posixpath.dirname(full))
    if elsewhere is None:
        return full, True
    if elsewhere == NOWHERE:
        raise RequestError(f"there is no directory {printable(posixpath.dirname(full))}")
    if not file.startswith("/"):
        raise RequestError(
            f"{printable(file)} is not an absolute path, and from which directory it counts "
            f"cannot be told: {printable(posixpath.dirname(full))} {elsewhere}"
        )
    return posixpath.normpath(file), False
