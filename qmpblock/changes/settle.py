"""Settling: what is left of a change is performed, step by step, until nothing is.

What the steps are `qmpblock.changes.unfinished` says, from what is seen in QEMU; here they are
taken. It is the same whoever does it: the controller itself, the next one, or `qmpblock recover`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qmpblock.changes import known
from qmpblock.changes.between import Astray
from qmpblock.changes.bitmaps import delete_bitmap
from qmpblock.changes.filters import take_out
from qmpblock.changes.finalize import before_finalize, bring_home, pivot
from qmpblock.changes.journal import Journal
from qmpblock.changes.known import agree, give_up
from qmpblock.changes.nodes import name_below, relink, restore_discard, restore_zeroes
from qmpblock.changes.operations import ManagersStaging
from qmpblock.changes.record import Record
from qmpblock.changes.step import Choice, Step
from qmpblock.changes.throttle import restore_limits
from qmpblock.changes.unfinished import steps
from qmpblock.errors import BusyError, CommandError, Error
from qmpblock.export.server import delete_export, delete_objects
from qmpblock.export.session import clear_dead
from qmpblock.graph.model import BlockGraph, Device
from qmpblock.graph.places import FileId
from qmpblock.host import imagefiles, ourfiles
from qmpblock.host.socketfolder import remove_socket
from qmpblock.names import is_ours, is_socket_of, paused_node, wire_credentials
from qmpblock.qemu.instant import resume
from qmpblock.qemu.job import Job
from qmpblock.qemu.refusals import in_use, is_busy, no_node, not_owned

if TYPE_CHECKING:
    from qmpblock.qemu.connection import Connection

__all__ = ["device_of", "settle"]

_LOOK = 0.05  # seconds between looks at a node that is being mapped
_DYING = 10.0  # seconds in which a device that was unplugged has let go of its node
_ROUNDS = 500  # of plan and perform
_OUTSIDE = ("delete-file", "keep-file", "clear-wire")  # what they change is not in the graph


async def settle(
    vm: Connection,
    record: Record,
    journal: Journal | None,
    choice: Choice,
    tell: Callable[[Step], None] | None = None,
) -> BlockGraph:
    """Perform what is left of a change, until nothing is; return the graph that shows it.

    `Record.took_effect` tells from that whether the change is done.

    Idempotent; can itself be killed anywhere. With `Choice.CONTINUE` a job that still works
    is left alone: whoever carries it on follows it.

    :param tell: is called before each step.
    """
    done: set[Step] = set()
    again: set[Step] = set()
    clock = asyncio.get_running_loop().time
    deadline, dying = clock() + vm.stall, clock() + min(_DYING, vm.stall)
    graph: BlockGraph | None = None
    rounds = 0
    while rounds < _ROUNDS:
        graph = await vm.graph() if graph is None else graph
        made = _made(record, journal, graph)
        stale = None if journal is None else journal.pivoted
        kept = () if journal is None else journal.kept()
        left = steps(record, graph, choice, made, kept=kept, stale=stale)
        todo = [step for step in left if step not in done]
        # What nothing uses was refused to go: the device that had it is gone, but not quite yet.
        refused = clock() < dying and any(step.verb == "delete-node" for step in left)
        mapped = clock() < deadline and _being_mapped(record, graph)
        if not todo and (refused or mapped):
            again |= {step for step in done if step.verb == "delete-node"}
            done -= again
            await _end_dead_exports(vm)  # nobody else does
            await asyncio.sleep(_LOOK)
            graph = None
            continue
        rounds += 1
        if not todo or todo[0].verb == "follow":
            return graph
        its = _Settling(vm, record, journal, graph)
        wires = [step for step in todo if step.verb == "clear-wire"]  # the last ones, if any
        for step in todo:
            if tell is not None and step not in again:
                tell(step)
            try:
                settled = step not in wires and await _PERFORM[step.verb](its, step)
            except CommandError:
                if not await _is_changed(its):
                    raise
                wires = []
                break  # what is due now, what is seen then tells
            if settled or step.verb not in ("wait", "cancel", "bring-home"):
                done.add(step)
        if wires:
            await _clear_wires(its, wires)
        if not all(step.verb in _OUTSIDE for step in todo):
            graph = None
    raise Error(
        f"what was left of {record.describe()} does not come to an end",
        remedy="look at it with: qmpblock disks ADDRESS; qmpblock jobs ADDRESS",
    )


async def _is_changed(its: _Settling) -> bool:
    """Whether a disk of the change has another chain than when it was looked at."""
    graph = await its.vm.graph()
    shapes = [
        {
            device.qom_path: device.chain.shape
            for device in seen.disks()
            if device.qom_path in its.record.devices
        }
        for seen in (its.graph, graph)
    ]
    return shapes[0] != shapes[1]


def _being_mapped(record: Record, graph: BlockGraph) -> bool:
    """Whether a node of the change is left only because some process of ours maps it.

    One that saw it as the active layer, and exports it a moment after it was that.
    """
    users = [graph.users(node) for node in record.nodes if node in graph.nodes]
    return any(
        names and all(is_ours(name.removeprefix("export ")) for name in names) for names in users
    )


@dataclass(frozen=True)
class _Settling:
    """What performing a step needs to know."""

    vm: Connection
    record: Record
    journal: Journal | None
    graph: BlockGraph


async def _on_job(its: _Settling, step: Step) -> None:
    job = Job(its.vm.monitor, step.what, its.record.operation)
    try:
        await _perform_on_job(its, job, step.verb)
    finally:
        job.end()


async def _relink(its: _Settling, step: Step) -> None:
    await relink(its.vm, step.what, str(step.to), its.graph)


async def _name_below(its: _Settling, step: Step) -> None:
    assert isinstance(step.to, Astray)
    await name_below(its.vm, step.to)


async def _restore_zeroes(its: _Settling, step: Step) -> None:
    await restore_zeroes(its.vm, step.what, str(step.to))


async def _restore_discard(its: _Settling, step: Step) -> None:
    await restore_discard(its.vm, step.what, str(step.to))


async def _restore_limits(its: _Settling, step: Step) -> None:
    assert isinstance(step.to, tuple)  # limits, and their group
    limits, group = step.to
    await restore_limits(its.vm, device_of(its.record, its.graph), dict(limits), group)


async def _bring_home(its: _Settling, step: Step) -> bool:
    """Bring an overlay home; return whether it cannot be brought there, and stays."""
    record = its.record.seen_in(its.graph)
    if isinstance(record, ManagersStaging):
        return not await known.bring_home(its.vm, record, its.journal, record.known_as)
    await bring_home(its.vm, record, its.journal, its.graph)
    return False


async def _resume(its: _Settling, step: Step) -> None:
    await resume(its.vm, step.what)


async def _end_dead_exports(vm: Connection) -> None:
    """End the exports of a controller that died: they keep nodes, and bitmaps, from going."""
    # Its server goes, too; a BusyError is about that alone.
    with contextlib.suppress(BusyError):
        await clear_dead(vm.monitor, stall=vm.stall)


async def _end_export(its: _Settling, step: Step) -> None:
    await _end_dead_exports(its.vm)
    await delete_export(its.vm.monitor, step.what, its.vm.stall)


async def _give_up(its: _Settling, step: Step) -> None:
    await give_up(its.vm, its.record, step.what)


async def _agree(its: _Settling, step: Step) -> None:
    names = step.to if isinstance(step.to, tuple) else (step.what,)
    for name in names:
        await agree(its.vm, its.record, its.journal, name)
    await resume(its.vm, paused_node(its.record.run))


async def _take_out(its: _Settling, step: Step) -> None:
    await take_out(its.vm, step.what, await its.vm.graph())


async def _delete_bitmap(its: _Settling, step: Step) -> None:
    node, _, name = step.what.partition("/")
    await _end_dead_exports(its.vm)  # one of its disk's own node may show it
    await delete_bitmap(its.vm, node, name)


async def _delete_node(its: _Settling, step: Step) -> None:
    """Delete a node that nothing uses; one that goes with its parents goes by itself."""
    try:
        await its.vm.monitor.execute("blockdev-del", {"node-name": step.what})
    except CommandError as error:
        if not any(expected(error) for expected in (not_owned, in_use, is_busy, no_node)):
            raise


async def _clear_wires(its: _Settling, steps: Sequence[Step]) -> None:
    """Remove what belongs to nodes that are gone: it may be half made, and there is no hurry."""
    await delete_objects(its.vm.monitor, [wire_credentials(step.what) for step in steps])
    for step in steps:
        if is_socket_of(str(step.to), step.what):  # else somebody forged it
            remove_socket(str(step.to))


async def _delete_file(its: _Settling, step: Step) -> None:
    assert its.journal is not None  # only it says what we made
    identity = its.journal.made()[step.what]
    pid = its.vm.monitor.peer_pid
    if pid is not None and identity in imagefiles.open_inodes(pid):
        return  # QEMU has it open: it is in use, under whatever name
    if step.verb == "keep-file":
        ourfiles.keep(step.what, FileId(*identity), str(step.to))
    else:
        ourfiles.remove(step.what, FileId(*identity))


#: How each verb of a step is performed.
_PERFORM: Mapping[str, Callable[[_Settling, Step], Awaitable[bool | None]]] = {
    **dict.fromkeys(("cancel", "wait", "pivot", "finalize", "dismiss"), _on_job),
    "relink": _relink,
    "name-below": _name_below,
    "restore-zeroes": _restore_zeroes,
    "restore-discard": _restore_discard,
    "restore-limits": _restore_limits,
    "bring-home": _bring_home,
    "resume": _resume,
    "end-export": _end_export,
    "take-out": _take_out,
    "give-up": _give_up,
    "agree": _agree,
    "delete-bitmap": _delete_bitmap,
    "delete-node": _delete_node,
    **dict.fromkeys(("delete-file", "keep-file"), _delete_file),
}


async def _perform_on_job(its: _Settling, job: Job, verb: str) -> None:
    if verb == "cancel":
        await job.cancel()
    elif verb == "pivot":
        await pivot(its.journal, job)
    elif verb == "finalize":
        await before_finalize(its.vm, its.record, device_of(its.record, its.graph))
        await job.finalize()
    if verb == "dismiss":
        await job.dismiss()
    else:
        await job.wait_concluded()


def _made(record: Record, journal: Journal | None, graph: BlockGraph) -> list[str]:
    """Return the image files that the change made, are there, are still those, and may go."""
    if journal is None:
        return []
    files, stay = [], record.may_start(graph, journal.entries)
    for file, identity in journal.made().items():
        if file in stay:
            continue
        path = Path(file)
        with contextlib.suppress(OSError), ourfiles.Directory(path.parent) as directory:
            if directory.holds(path.name, FileId(*identity)):
                files.append(file)
    return files


def device_of(record: Record, graph: BlockGraph) -> Device:
    """Return the disk of a change, or, if it was unplugged, what stands for it."""
    for device in graph.devices:
        if device.qom_path == record.devices[0]:
            return device
    return Device(
        id=record.names[0],
        drive=None,
        qom_path=record.devices[0],
        removable=False,
        read_only=False,
        chain=None,
    )
