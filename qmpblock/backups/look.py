"""What a backup is to be, disk by disk, or why there can be none; nothing is touched by it.

That is looked at by whoever makes one, and by whoever only says what would be made.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, TypedDict

from qmpblock.backups.decision import (
    Decision,
    Kind,
    SeenDisk,
    check_vm,
    decide,
    parents_wanted,
)
from qmpblock.backups.imagefile import first_broken
from qmpblock.backups.lowerfiles import lower_files
from qmpblock.backups.point import BackedUpVM, Point, every_image, images_of, when_of
from qmpblock.changes.identity import identify
from qmpblock.changes.leftovers import check_way, make_way
from qmpblock.copying.look import look
from qmpblock.copying.options import CopyOptions
from qmpblock.copying.targetname import check_host
from qmpblock.errors import UNTOUCHED, Error, RequestError, UnsupportedError, shell_words
from qmpblock.host.openfiles import OpenFiles
from qmpblock.managers import Work
from qmpblock.names import lock_names, new_run
from qmpblock.qemu import ownership

if TYPE_CHECKING:
    from qmpblock.backups.directory import Backups
    from qmpblock.mapping import MappedDisk
    from qmpblock.qemu.connection import Connection

__all__ = [
    "NO_BACKUP",
    "BackupWords",
    "check_copies",
    "check_disks",
    "decided",
    "drafted",
    "say_none",
    "see",
]

NO_BACKUP = "there is no backup"  # how it stands where one failed


class BackupWords(TypedDict, total=False):
    """The options of a backup that are those of a copy (`qmpblock.copying.options`)."""

    compress: bool
    speed: int
    latency: float
    fleece: str | os.PathLike[str] | None
    fleece_limit: int | None
    verify: bool


def check_disks(
    vm: Connection, directory: str | os.PathLike[str], disks: Sequence[MappedDisk]
) -> None:
    """Refuse what is no list of disks, and those of another host, before anything is made here.

    :raise RequestError: it has none, or one twice.
    :raise UnsupportedError: they are another host's.
    """
    check_host(vm.monitor.address, "backup", [os.fspath(directory)])
    if not disks:
        raise RequestError("a backup of no disk is none", standing=UNTOUCHED)
    paths = [disk.device.qom_path for disk in disks]
    if len(set(paths)) < len(paths):
        raise RequestError("a disk is named twice", standing=UNTOUCHED)


async def drafted(
    vm: Connection, backups: Backups, disks: Sequence[MappedDisk], *, undo: bool = True
) -> Point:
    """See that a directory is of this VM; return what is known of the backup by now.

    :param undo: whether what a dead controller left on the disks is undone; else that is an error.
    :raise Error: there can be none; nothing else was touched.
    """
    devices = [disk.device for disk in disks]
    await ownership.ask(vm.monitor, devices)
    await ownership.ask_for_change(vm, Work("backup", devices[0].chain.active.file))
    await (make_way if undo else check_way)(vm, lock_names(devices))
    me = await identify(vm)
    every = [SeenDisk.of(one) for one in (await vm.graph()).disks()]
    check_vm(backups.points, me.name, me.uuid, every, backups.path)
    backups.check_new()
    when = when_of(datetime.now(UTC), _taken(backups))
    of, number = BackedUpVM(me.name, me.uuid), backups.next_number
    return Point(backups.id or new_run(), new_run(), when, "", of, (), number)


async def see(vm: Connection, disks: Sequence[MappedDisk]) -> list[SeenDisk]:
    """See how disks are now, and what they lie on."""
    graph = await vm.graph()
    for disk in disks:
        disk.device = graph.device(disk.device.qom_path)
    devices = [disk.device for disk in disks]
    lower = lower_files(graph, devices, OpenFiles(vm.monitor.peer_pid))
    return [SeenDisk.of(device, files) for device, files in zip(devices, lower, strict=True)]


async def decided(
    backups: Backups, seen: Sequence[SeenDisk], kind: Kind | None
) -> tuple[Decision, ...]:
    """Say what the backup of each disk is to be.

    :raise RequestError: increments are asked for, and one cannot be.
    """
    broken = await _broken(backups, seen)
    return tuple(decide(backups.points, disk, broken, kind) for disk in seen)


async def check_copies(
    vm: Connection,
    directory: str,
    targets: Mapping[MappedDisk, str],
    words: BackupWords,
    *,
    undo: bool = True,
) -> None:
    """Refuse what no copy can be made of; say of which disks one can.

    None is left out unasked: whoever restores the VM may need it.

    :param directory: of the backups, for people.
    :param undo: as of `drafted`.
    :raise Error: of one it cannot.
    """
    options = CopyOptions(format="qcow2", **words)
    try:
        await look(vm, targets, options, undo=undo)
    except UnsupportedError as error:
        fit = []
        for disk, place in targets.items():
            with contextlib.suppress(UnsupportedError):
                await look(vm, {disk: place}, options, undo=undo)
                fit.append(shell_words([disk.name]))
        if 0 < len(fit) < len(targets):
            address, place = map(shell_words, ([str(vm.monitor.address)], [directory]))
            chosen = " --disk ".join(fit)
            others = f"back up the others alone: qmpblock backup {address} {place} --disk {chosen}"
            error.remedy = f"{error.remedy}; or {others}" if error.remedy else others
        raise


def say_none(why: BaseException) -> None:
    """Have an error say that there is no backup."""
    if isinstance(why, Error) and why.standing not in (UNTOUCHED, NO_BACKUP):
        said = f"{NO_BACKUP}, and the next one can be what this one was to be"
        why.standing = f"{why.standing}; {said}" if why.standing else said


async def _broken(backups: Backups, seen: Sequence[SeenDisk]) -> dict[str, str]:
    """Return what is wrong with the images that increments could lie on, by their files."""
    broken, every = {}, every_image(backups.points)
    for disk in seen:
        for one in parents_wanted(backups.points, disk):
            try:
                why = await first_broken(backups, images_of(every, one.file))
            except RequestError as error:
                why = error.message
            if why is not None:
                broken[one.file] = f"of what it would lie on, {why}"
    return broken


def _taken(backups: Backups) -> list[str]:
    """Return by what times files there are called."""
    names = backups.names()
    return [*(point.when for point in backups.points), *(_begin(name) for name in names)]


def _begin(name: str) -> str:
    """Return the time in a file's name, with its number if it has one."""
    first, _, rest = name.partition(".")[0].partition("-")
    number = rest.partition("-")[0]
    return f"{first}-{number}" if number.isdecimal() else first
