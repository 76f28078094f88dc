"""Known: a manager that moves a disk's guest itself, and QEMU, are to name the same image.

A manager hears of QEMU's pivot when that is done, and notes it then. If its daemon is killed just
between, it names the stale image for ever (K41). So the VM is paused from before the pivot until
both say the same: nothing is written between, and a VM that is started from either image has lost
nothing. Where the daemon has forgotten it, the guest goes back to the image that it names, which
holds the same.

So it is where the guest moves on to an overlay of ours that is to come home again: from before the
snapshot until both name it. From then on whoever starts the VM starts it from there.

Whoever answers our queries by the manager's monitor has no change of its own under way then: so
where QEMU shows no job of its any more, what it says is its last word.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from itertools import pairwise
from typing import TYPE_CHECKING

from qmpblock.cancellation import undisturbed
from qmpblock.changes.filters import put_back
from qmpblock.changes.finalize import keep_exports_away, until_unused
from qmpblock.changes.journal import Journal
from qmpblock.changes.nodes import set_writable
from qmpblock.changes.record import PIVOTED, Record
from qmpblock.errors import (
    BusyError,
    DisconnectedError,
    Error,
    GraphError,
    StalledError,
    UnsupportedError,
    printable,
    shell_words,
)
from qmpblock.graph.model import BlockGraph
from qmpblock.names import paused_node
from qmpblock.qemu.instant import instant
from qmpblock.qemu.job import Progress
from qmpblock.qemu.jobstate import ACTIVE

if TYPE_CHECKING:
    from qmpblock.qemu.connection import Connection

__all__ = ["NEAR", "agree", "bring_home", "catch_up", "follow", "give_up", "move_up", "pivot"]

_LOOK = 0.02  # seconds between looks
#: Bytes that the guest may be ahead by, at the most, when it is paused for the rest.
NEAR = 64 << 20


async def follow(
    vm: Connection,
    name: str,
    show: Callable[[tuple[int, int]], None],
    until: Callable[[], Awaitable[bool]] | None = None,
) -> None:
    """Wait until the manager has no job on a disk any more, or is where it is to be.

    :param name: what it calls the disk.
    :param show: is called with how far the job is, and how far it is to go.
    :param until: whether it is there.
    :raise StalledError: it does not move.
    """
    clock = asyncio.get_running_loop().time
    last, moved = None, clock()
    while (now := await vm.monitor.through(lambda lender: lender.job(name))) is not None:
        if now != last:
            last, moved = now, clock()
            show(now)
        if until is not None and await until():
            return
        if clock() - moved > vm.stall:
            raise StalledError(
                f"libvirt's job on {name} has not moved for {vm.stall:g} s",
                remedy="look whether its storage hangs, or give a longer --stall",
            )
        await asyncio.sleep(_LOOK)


async def catch_up(
    vm: Connection,
    name: str,
    show: Callable[[Progress], None],
    is_asked: Callable[[], bool] = lambda: True,
    near: Callable[[], int] = lambda: NEAR,
) -> None:
    """Wait until the manager's job may pivot: it was asked to, and the guest is near.

    :param name: what it calls the disk.
    :param show: is called with its progress; `is_asked`: whether it was asked.
    :param near: returns the bytes by which the guest may be ahead.
    :raise StalledError: the guest writes faster than it copies.
    """
    ready, through = False, vm.monitor.through

    async def caught_up() -> bool:
        nonlocal ready
        ready = await through(lambda lender: lender.ready(name))
        return ready

    await follow(vm, name, lambda now: show(Progress("running", "copying", *now)), caught_up)
    if not ready:
        raise Error(
            f"libvirt has ended its job on {name} before it was whole",
            remedy="see why in its log (no room?), then run this again",
        )
    clock = asyncio.get_running_loop().time
    asked: float | None = None
    while True:
        seen = await through(lambda lender: lender.job(name))
        if seen is None:
            raise Error(f"somebody has ended libvirt's job on {name}")
        show(Progress("ready", "ready", *seen))
        if is_asked():
            if seen[1] - seen[0] <= near():
                return
            asked = clock() if asked is None else asked
            if clock() - asked > vm.stall:
                raise StalledError(
                    f"libvirt's job on {name} does not converge: the guest writes faster than "
                    "it copies",
                    remedy="let the guest write less, or pause the VM while this runs again",
                )
        await asyncio.sleep(_LOOK)


async def move_up(vm: Connection, record: Record, journal: Journal | None, name: str) -> None:
    """Pause the VM, have the manager move the guest to an overlay of ours, and know of it; go on.

    :param name: what it calls the disk.
    :raise Error: it did not; the guest is where it was.
    """
    _check_lent(vm, record)
    began = time.monotonic()
    async with instant(vm, paused_node(record.run)):
        now, later = await vm.monitor.through(lambda lender: lender.files())
        said = [one.get(name, "") for one in (now, later) if one is not None]
        if not all(_same(file, record.base_file) for file in said):
            raise GraphError(f"somebody else is at work on {printable(name)}")
        refused: Error | None = None
        try:
            await vm.monitor.through(lambda lender: lender.snapshot({name: record.top_file}))
        except DisconnectedError:
            raise
        except Error as error:
            refused = error
        back = await agree(vm, record, None, name)
        if back is None:
            raise refused or _changed(name)
        if back:
            raise refused or Error(
                f"libvirt has forgotten its snapshot of {printable(name)}: its daemon was ended "
                "in the middle"
            )
    if journal is not None:
        journal.held.append(time.monotonic() - began)


async def bring_home(vm: Connection, record: Record, journal: Journal | None, name: str) -> bool:
    """Have the manager commit an overlay of ours into its image, and the guest go on there.

    Carries on a job of its that does so already. Returns False where that cannot be before the VM
    is started again: then the overlay stays, as a layer that the manager knows.

    :param name: what it calls the disk.
    :raise Error: the manager could not; the guest goes on in the overlay, which it knows.
    """
    _check_lent(vm, record)
    graph = await vm.graph()
    path = record.passage(name).device
    device = graph.disk_at(path)
    if device is None or not any(job.type == "commit" and not job.ours for job in device.jobs):
        forgotten = await vm.monitor.through(lambda lender: lender.ready(name))
        if forgotten and not _works(path, graph):
            return False  # a job that QEMU does not have: its daemon has forgotten its end (K41)
        await _begin_home(vm, record, name)
    await catch_up(vm, name, lambda _: None)
    async with AsyncExitStack() as alone:
        await keep_exports_away(vm, (record.top,), alone)
        await until_unused(vm, record)
        await undisturbed(pivot(vm, record, journal, name))
    return True


async def _begin_home(vm: Connection, record: Record, name: str) -> None:
    """Have the manager begin, as soon as it knows of the overlay, and nobody's job is on the disk.

    :raise BusyError: somebody's is, for the stall limit.
    :raise Error: it refuses.
    """
    through, clock = vm.monitor.through, asyncio.get_running_loop().time
    deadline, path = clock() + vm.stall, record.passage(name).device
    while True:
        graph = await vm.graph()
        device, works = graph.disk_at(path), _works(path, graph)
        below = () if device is None else (one.node.name for one in device.chain.layers[1:])
        late = clock() > deadline or (not works and record.base not in below)
        layers = await through(lambda lender: lender.layers(name))
        ours = [
            (its, below)
            for (over, its), (under, below) in pairwise(layers)
            if its and below and _same(over, record.top_file) and _same(under, record.base_file)
        ]
        try:
            if ours and not works:
                await _commit(vm, name, *ours[0])
                return
        except BusyError:
            if late:
                raise
        if late and works:
            raise BusyError(
                f"an overlay of ours cannot come home: somebody else's job is at work on "
                f"{printable(name)}, for {vm.stall:g} s by now"
            )
        if late:
            raise GraphError(
                f"libvirt does not know {printable(record.base_file)} as the layer of "
                f"{printable(name)} below {printable(record.top_file)}",
                remedy="compare them: virsh dumpxml DOMAIN; qmpblock disks ADDRESS",
            )
        await asyncio.sleep(_LOOK)


async def _commit(vm: Connection, name: str, top: str, base: str) -> None:
    await vm.monitor.through(lambda lender: lender.commit(name, base, top, active=True))


async def pivot(vm: Connection, record: Record, journal: Journal | None, *names: str) -> None:
    """Pause the VM, have the manager pivot and know of it, and go on.

    :param names: what it calls the disks.
    :raise Error: its daemon has forgotten it; the guest is back where it was.
    """
    began = time.monotonic()
    async with instant(vm, paused_node(record.run)):
        for name in names:
            await _pivot(vm, record, journal, name)
    if journal is not None:
        journal.held.append(time.monotonic() - began)


async def _pivot(vm: Connection, record: Record, journal: Journal | None, name: str) -> None:
    try:
        await vm.monitor.through(lambda lender: lender.pivot(name))
    except DisconnectedError:
        raise
    except Error:  # or its daemon went away over it, and it has been done
        if await vm.monitor.through(lambda lender: lender.job(name)) is not None:
            raise
    over = await agree(vm, record, journal, name)
    if over is None:
        raise _changed(name)
    if not over:
        raise Error(
            f"libvirt has forgotten its pivot of {name}: its daemon was ended in the middle",
            standing="the guest goes on in the image that libvirt names; nothing is lost",
            remedy="until the VM is started again libvirt takes this disk for busy, and "
            "changes its chain no more: virsh shutdown, virsh start",
        )


def _changed(name: str) -> GraphError:
    return GraphError(
        f"somebody else has changed the images of {printable(name)} at the same time",
        standing="the guest goes on in the image that QEMU and libvirt both name; nothing is lost",
        remedy="look at it: qmpblock disks ADDRESS; virsh domblklist DOMAIN",
    )


async def give_up(vm: Connection, record: Record, name: str) -> None:
    """Have the manager give up its job on a disk, and wait until QEMU has none.

    :param name: what it calls the disk.
    :raise StalledError: it goes on.
    """
    _check_lent(vm, record)
    deadline = asyncio.get_running_loop().time() + vm.stall
    device = record.passage(name).device
    while _works(device, await vm.graph()):
        if asyncio.get_running_loop().time() > deadline:
            raise StalledError(
                f"libvirt does not give up its job on {printable(name)}",
                remedy=f"virsh blockjob DOMAIN {shell_words([name])} --abort",
            )
        with contextlib.suppress(Error):  # it is about to end, or another one was faster
            await vm.monitor.through(lambda lender: lender.abort(name))
        await asyncio.sleep(_LOOK)


async def agree(vm: Connection, record: Record, journal: Journal | None, name: str) -> bool | None:
    """Wait until the manager names the image that QEMU has, or have QEMU use the one that it names.

    The VM is paused. Returns whether the guest has gone over; None where it is on neither image,
    for somebody has changed the chain since, by the manager.

    :param name: what the manager calls the disk.
    :raise StalledError: its job does not come to its end.
    """
    _check_lent(vm, record)
    clock = asyncio.get_running_loop().time
    deadline = clock() + vm.stall
    while True:
        graph = await vm.graph()
        record = record.seen_in(graph)
        passage = record.passage(name)
        here, there = passage.nodes, passage.files
        device = graph.disk_at(passage.device)
        if device is None:
            return False  # it was unplugged
        if not _works(passage.device, graph):
            now, later = await vm.monitor.through(lambda lender: lender.files())
            # One that was plugged into the running VM alone is not there at the next start.
            said = {one[name] for one in (now, later) if one is not None and name in one}
            moved = passage.is_over(graph)
            # Somebody may have changed the chain since, by the manager: then they agree on that.
            for image in (there[moved], device.chain.active.file):
                if all(_same(file, image) for file in said):
                    if journal is not None and record.took_effect(graph) is True:
                        journal.mark(**{PIVOTED: True})
                    return moved if moved or passage.stays(graph) else None
            if (
                all(_same(file, there[not moved]) for file in said)
                and here[not moved] in graph.nodes
            ):
                await set_writable(vm, here[not moved])
                await put_back(vm, device, here[not moved])
                continue
        if clock() > deadline:
            raise StalledError(
                f"libvirt and QEMU do not name the same image of {printable(name)}",
                standing="the VM is paused: both images hold the same",
                remedy="compare virsh domblklist DOMAIN with qmpblock disks ADDRESS; virsh "
                f"blockjob DOMAIN {printable(name)} --abort",
            )
        await asyncio.sleep(_LOOK)


def _check_lent(vm: Connection, record: Record) -> None:
    """Refuse to go behind the manager's back.

    :raise UnsupportedError: this is not its monitor.
    """
    if not vm.monitor.is_lent:
        raise UnsupportedError(
            f"{record.describe()} can only be undone by the manager itself",
            standing="nothing was touched",
            remedy=f"run: qmpblock recover {shell_words([record.vm.monitor])}",
        )


def _works(path: str, graph: BlockGraph) -> bool:
    """Whether somebody's job is on the disk, or one has ended that its owner has yet to note."""
    device = graph.disk_at(path)
    on_it = () if device is None else device.jobs
    ended = (job for job in graph.jobs if job.status not in ACTIVE)
    return any(not job.ours for job in (*on_it, *ended))


def _same(file: str, other: str) -> bool:
    return os.path.realpath(file) == os.path.realpath(other)
