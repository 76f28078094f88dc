"""Stranded: an overlay of ours from which its manager has started a VM again.

Where QEMU dies in the midst of an `allocate --full` for which the manager took the overlay
(`qmpblock.allocation.staged`), the next start is from that, and nothing is lost. It is a layer of
the chain then, as any. But of what died nothing of ours is to be left: so it comes home as by
`commit`, and its file goes, by `recover` of that VM, and before anything is allocated there.
"""

from __future__ import annotations

import posixpath
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from qmpblock.chains.managed import commit
from qmpblock.chains.owner import is_asked
from qmpblock.changes.identity import identify
from qmpblock.changes.imagerecovery import holds_nothing
from qmpblock.changes.journal import Journal
from qmpblock.changes.leftovers import Recovery
from qmpblock.changes.operations import ManagersStaging
from qmpblock.changes.step import Step
from qmpblock.changes.survey import is_same_process, survey
from qmpblock.errors import UNTOUCHED, BusyError, printable
from qmpblock.graph.openings import storage_of
from qmpblock.graph.places import FileId
from qmpblock.host.openfiles import OpenFiles
from qmpblock.host.ourfiles import Directory
from qmpblock.host.processes import is_running
from qmpblock.mapping import MappedDisk

if TYPE_CHECKING:
    from qmpblock.graph.model import DiskDevice
    from qmpblock.qemu.connection import Connection

__all__ = ["bring_in", "check_in", "recover_stranded"]


@dataclass(frozen=True)
class _Stranded:
    """What is left of an allocation whose QEMU died.

    :ivar files: of those that it made, which are there, and which they are.
    :ivar device: the disk whose active layer the overlay is; None where nobody uses it.
    """

    journal: Journal
    record: ManagersStaging
    files: dict[str, FileId]
    device: DiskDevice | None

    @property
    def steps(self) -> tuple[Step, ...]:
        """What is to be done about it."""
        steps = [
            Step("delete-file", file, "we made it, for a QEMU that died") for file in self.files
        ]
        if self.device is not None:
            why = "its QEMU died, and the VM was started from it"
            steps.insert(0, Step("bring-home", self.record.top_file, why))
        return tuple(steps)


async def recover_stranded(
    vm: Connection,
    *,
    dry_run: bool = False,
    tell: Callable[[str, Step], None] | None = None,
) -> list[Recovery]:
    """Bring in all that is stranded in a VM. See `VM.recover`."""
    done = []
    for one in await _find(vm):
        what = one.record.describe()
        if not dry_run:
            await _bring_in(vm, one, None if tell is None else partial(tell, what))
        done.append(Recovery(what, one.record.run, one.steps, None if dry_run else True))
    return done


async def bring_in(disk: MappedDisk) -> None:
    """Bring in what is stranded on a disk, before it is planned for."""
    for one in await _find_on(disk):
        await _bring_in(disk.vm, one, None)
        await disk.refresh()


async def check_in(disk: MappedDisk) -> None:
    """Refuse a disk on which something is stranded. Changes nothing.

    :raise BusyError: something is.
    """
    for one in await _find_on(disk):
        raise BusyError(
            f"{disk.name} was started from {printable(one.record.top_file)}, an overlay of "
            "an allocation whose QEMU died",
            standing=UNTOUCHED,
            remedy="whatever allocates there next brings it home first; so does: qmpblock "
            "recover ADDRESS",
        )


async def _find_on(disk: MappedDisk) -> list[_Stranded]:
    path = disk.device.qom_path
    found = await _find(disk.vm)
    return [one for one in found if one.device is not None and one.device.qom_path == path]


async def _find(vm: Connection) -> list[_Stranded]:
    if not is_asked(vm):
        return []
    me = await identify(vm)
    found = []
    for journal in survey().journals:
        record = journal.record
        if (
            isinstance(record, ManagersStaging)
            and record.vm.uuid == me.uuid
            and not is_same_process(record.vm, me)
            and not is_running(record.vm.pid, record.vm.start, record.vm.boot)
        ):
            one = await _look(vm, journal, record)
            if one is not None:
                found.append(one)
    return found


async def _look(vm: Connection, journal: Journal, record: ManagersStaging) -> _Stranded | None:
    """Return what is left; None where somebody else has made it a layer of his."""
    files = _files(journal)
    overlay = files.get(record.top_file)
    if overlay is None:
        return _Stranded(journal, record, files, None)
    opened = OpenFiles(vm.monitor.peer_pid)
    graph = await vm.graph()
    places = opened.places(graph.nodes.values())
    for device in graph.disks():
        storage = storage_of(device.chain.active)
        place = None if storage is None else places.get(storage.name)
        below = device.chain.layers[1:2]
        if getattr(place, "file", None) == overlay and below:
            return _Stranded(journal, record, files, device)
    now, later = await vm.monitor.through(lambda lender: lender.files())
    known = {file for said in (now, later or {}) for file in said.values()}
    if overlay in opened.ids() or record.top_file in known:
        return None
    assert overlay.inode is not None  # it is a regular file
    of_no_use = journal.pivoted or await holds_nothing(
        record.top_file, "qcow2", (overlay.device, overlay.inode)
    )
    return _Stranded(journal, record, files, None) if of_no_use else None


def _files(journal: Journal) -> dict[str, FileId]:
    """Return the files that were made, and are there.

    By inode: a device may have another number since the host was started again.
    """
    files = {}
    for file, (_, inode) in journal.made().items():
        try:
            with Directory(posixpath.dirname(file)) as directory:
                status = directory.status(posixpath.basename(file))
        except OSError:
            continue  # it cannot be reached any more
        known = None if status is None else FileId.of(status)
        if known is not None and known.inode == inode:
            files[file] = known
    return files


async def _bring_in(vm: Connection, one: _Stranded, tell: Callable[[Step], None] | None) -> None:
    for step in one.steps:
        if tell is not None:
            tell(step)
        if step.verb == "bring-home":
            assert one.device is not None  # else there is no such step
            async with commit(MappedDisk(vm, one.device), base="@1"):
                pass
        else:
            with Directory(posixpath.dirname(step.what)) as directory:
                directory.remove(posixpath.basename(step.what), one.files[step.what])
    one.journal.remove()
