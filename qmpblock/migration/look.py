"""What is asked of both VMs before a migration, and which disk goes where. Changes nothing."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from qmpblock.chains.plan import check_idle
from qmpblock.changes.leftovers import make_way
from qmpblock.errors import (
    UNTOUCHED,
    BusyError,
    CommandError,
    RequestError,
    UnsupportedError,
    printable,
)
from qmpblock.host.openfiles import OpenFiles
from qmpblock.host.processes import describe_process
from qmpblock.migration.diskterms import Allocation, DiskTerms
from qmpblock.migration.kept import Kept, find_kept
from qmpblock.migration.likeness import check_likeness, reserved_zeros
from qmpblock.migration.managed import ask_manager
from qmpblock.migration.pairing import check_pairing
from qmpblock.names import lock_names, new_run, stream_socket
from qmpblock.qemu import lock, ownership
from qmpblock.ranges import Ranges

if TYPE_CHECKING:
    from qmpblock.graph.model import BlockGraph, DiskDevice
    from qmpblock.migration.over import Over
    from qmpblock.qemu.connection import Connection
    from qmpblock.qemu.monitor import Monitor

__all__ = ["Pair", "Plan", "look"]

#: What to do about a source whose guest does not run, by its run state.
_REMEDIES = {
    "paused": "continue it first (cont)",
    "prelaunch": "continue it first (cont)",
    "suspended": "wake it first (system_wakeup)",
    "shutdown": "it has powered itself off: start it at the destination, from a copy of its images",
}


@dataclass(frozen=True)
class Pair:
    """One disk of the guest's, as it is at both sides.

    :ivar top: whether its active layer alone is copied, onto one that lies on the same image.
    :ivar allocation: what has host space at the destination.
    :ivar reserved: what of it reads as zeros and is to have host space there even so.
    """

    source: DiskDevice
    destination: DiskDevice
    top: bool = False
    allocation: Allocation = "thin"
    reserved: Ranges = field(default_factory=Ranges)

    @property
    def full(self) -> bool:
        """Whether all of it has host space at the destination."""
        return self.allocation == "full"


@dataclass(frozen=True)
class Plan:
    """What a migration is to do.

    :ivar disks: every disk of the source; `pairs`: those that are written to, with what they are
        there; `copied`: those of them that are copied.
    :ivar arriving: every disk of the destination.
    :ivar terms: what is done with the disks.
    :ivar kept: what an attempt before left of them, that is gone on with.
    """

    disks: tuple[DiskDevice, ...]
    arriving: tuple[DiskDevice, ...]
    pairs: tuple[Pair, ...]
    copied: tuple[Pair, ...]
    warnings: tuple[str, ...]
    terms: DiskTerms
    kept: Kept | None = None

    @property
    def paths(self) -> tuple[tuple[str, str], ...]:
        """The pairs by their paths in QEMU's object tree."""
        return tuple((pair.source.qom_path, pair.destination.qom_path) for pair in self.pairs)


async def look(
    source: Connection,
    destination: Connection,
    terms: DiskTerms,
    *,
    over: Over | None = None,
    resumes: bool = True,
) -> Plan:
    """Say what is to be done, or refuse; only what a dead controller left at the source is undone.

    That is not done where it can be gone on with.

    :param resumes: whether that may be.
    :raise RequestError: it cannot be done; nothing was touched.
    :raise BusyError: a job, or another controller, is at work on a disk.
    """
    await _check_reach(source, destination, over)
    if _is_same(source, destination):
        raise RequestError("source and destination are the same VM", standing=UNTOUCHED)
    await ask_manager(source, terms, tls=over is not None and over.here is not None)
    graph, arriving = await asyncio.gather(source.graph(), destination.graph())
    disks = graph.disks()
    await _check_source(source, disks)
    kept = None
    if set(lock_names(disks)) & set(await lock.names(source.monitor)):
        if resumes and terms == DiskTerms() and over is None:
            kept = await find_kept(source, disks)
        if kept is None:
            await make_way(source, lock_names(disks))
        graph = await source.graph()
        disks = graph.disks()
    run, jobs = ("", ()) if kept is None else (kept.record.run, kept.record.helpers)
    pairing = await check_pairing(source, destination, terms, graphs=(graph, arriving), resumed=run)
    pairs = _pairs(pairing.disks, graph, arriving, terms)
    there = [pair.destination for pair in pairs]
    if kept is not None and not await kept.fits(destination, there):
        return await look(source, destination, terms, over=over, resumes=False)
    for device in disks:
        check_idle(device, jobs)
    if terms.allocation == "same":
        pairs = tuple([await _alike(source, destination, pair) for pair in pairs])
    copied = pairs if terms.copies else ()
    return Plan(disks, arriving.disks(), pairs, copied, pairing.warnings, terms, kept)


async def _alike(source: Connection, destination: Connection, pair: Pair) -> Pair:
    zeros = await reserved_zeros(source, pair.source, top=pair.top)
    check_likeness(destination, pair.destination, zeros)
    return replace(pair, reserved=zeros)


def _pairs(
    wanted: Iterable[tuple[str, str]],
    source: BlockGraph,
    destination: BlockGraph,
    terms: DiskTerms,
) -> tuple[Pair, ...]:
    """Return which disk goes where: to that which the guest finds at the same place."""
    here = {device.qom_path: device for device in source.disks()}
    there = {device.qom_path: device for device in destination.disks()}
    try:
        found = [(here[one], there[other]) for one, other in wanted]
    except KeyError:
        raise BusyError("a disk was plugged in or out meanwhile", standing=UNTOUCHED) from None
    top, space = terms.layers == "top", terms.allocation
    return tuple(Pair(one, other, top and len(one.chain.layers) > 1, space) for one, other in found)


async def _check_reach(source: Connection, destination: Connection, over: Over | None) -> None:
    for side, vm in (("source", source), ("destination", destination)):
        monitor = vm.monitor
        if monitor.by_turns:
            raise UnsupportedError(
                f"the {side}'s monitor, {monitor.address}, is had by turns, and its events tell "
                "how a migration goes",
                standing=UNTOUCHED,
                remedy="have its manager migrate it, or give the VM a second monitor",
            )
        if monitor.can_pass_fds:
            await _check_is_its_own(monitor, side)
        elif side == "source" or (monitor.forward is None and over is None):
            raise UnsupportedError(
                f"the monitor of the {side}, {monitor.address}, is no UNIX socket, and a QEMU gets "
                "its end of the connection between both by its monitor",
                standing=UNTOUCHED,
                remedy="run qmpblock on the source's host, and give UNIX monitors; of a "
                "destination on another host: ssh://[USER@]HOST[:PORT]/PATH/OF/MONITOR",
            )


async def _check_is_its_own(monitor: Monitor, side: str) -> None:
    """Refuse a socket of a program that passes it on: what is seen of that is not the VM's.

    A manager may have made it, too, and handed it to its QEMU: that one takes a descriptor.
    """
    pid = monitor.peer_pid
    if pid is None or OpenFiles(pid).is_qemu:
        return
    name = stream_socket(new_run())
    try:
        with open(os.devnull, "rb") as nothing:  # noqa: PTH123, ASYNC230 - its descriptor is wanted
            await monitor.pass_fd(name, nothing.fileno())
        await monitor.execute("closefd", {"fdname": name})
    except CommandError as error:
        raise UnsupportedError(
            f"the monitor of the {side}, {monitor.address}, is passed on by "
            f"{describe_process(pid)}: QEMU itself is elsewhere ({printable(error.description)})",
            standing=UNTOUCHED,
            remedy="give the address of its own monitor; of a destination on another host: "
            "ssh://[USER@]HOST[:PORT]/PATH/OF/MONITOR",
        ) from None


def _is_same(source: Connection, destination: Connection) -> bool:
    pid = source.monitor.peer_pid
    return pid is not None and pid == destination.monitor.peer_pid


async def _check_source(source: Connection, disks: tuple[DiskDevice, ...]) -> None:
    await ownership.ask(source.monitor, disks)
    status = str((await source.monitor.execute("query-status"))["status"])
    if status != "running":
        raise UnsupportedError(
            f"the source does not run (query-status says {printable(status)}): whether the guest "
            "is to go on at the destination cannot be told",
            standing=UNTOUCHED,
            remedy=_REMEDIES.get(status, "see why it stopped; continue it first (cont)"),
        )
