"""What is asked of both VMs before a migration, and which disk goes where. Changes nothing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qmpblock.chains.plan import check_idle
from qmpblock.changes.leftovers import make_way
from qmpblock.errors import UNTOUCHED, BusyError, RequestError, UnsupportedError, printable
from qmpblock.managers import Work
from qmpblock.migration.rehearsal import check_pairing
from qmpblock.names import lock_names
from qmpblock.qemu import ownership

if TYPE_CHECKING:
    from qmpblock.graph.model import BlockGraph, DiskDevice
    from qmpblock.qemu.connection import Connection

__all__ = ["Pair", "Plan", "look"]


@dataclass(frozen=True)
class Pair:
    """One disk of the guest's, as it is at both sides."""

    source: DiskDevice
    destination: DiskDevice


@dataclass(frozen=True)
class Plan:
    """What a migration is to do.

    :ivar disks: every disk of the source; `pairs`: those that are written to, with what they are
        there; `copied`: those of them that are copied.
    :ivar arriving: every disk of the destination.
    """

    disks: tuple[DiskDevice, ...]
    arriving: tuple[DiskDevice, ...]
    pairs: tuple[Pair, ...]
    copied: tuple[Pair, ...]
    warnings: tuple[str, ...]


async def look(source: Connection, destination: Connection, *, memory_only: bool) -> Plan:
    """Say what is to be done, or refuse; only what a dead controller left at the source is undone.

    :raise RequestError: it cannot be done; nothing was touched.
    :raise BusyError: a job, or another controller, is at work on a disk.
    """
    _check_reach(source, "source")
    _check_reach(destination, "destination")
    if _is_same(source, destination):
        raise RequestError("source and destination are the same VM", standing=UNTOUCHED)
    graph = await source.graph()
    disks = graph.disks()
    await _check_source(source, disks)
    await make_way(source, lock_names(disks))
    graph, arriving = await source.graph(), await destination.graph()
    pairing = await check_pairing(source, destination, copies=not memory_only)
    pairs = _pairs(pairing.disks, graph, arriving)
    for device in graph.disks():
        check_idle(device)
    first = disks[0].chain.active.file if disks else ""
    await ownership.ask_for_change(source, Work("migrate", first))
    copied = () if memory_only else pairs
    return Plan(graph.disks(), arriving.disks(), pairs, copied, pairing.warnings)


def _pairs(
    wanted: Iterable[tuple[str, str]], source: BlockGraph, destination: BlockGraph
) -> tuple[Pair, ...]:
    """Return which disk goes where: to that which the guest finds at the same place."""
    here = {device.qom_path: device for device in source.disks()}
    there = {device.qom_path: device for device in destination.disks()}
    try:
        return tuple(Pair(here[one], there[other]) for one, other in wanted)
    except KeyError:
        raise BusyError("a disk was plugged in or out meanwhile", standing=UNTOUCHED) from None


def _check_reach(vm: Connection, side: str) -> None:
    if not vm.monitor.can_pass_fds:
        raise UnsupportedError(
            f"the monitor of the {side}, {vm.monitor.address}, is no UNIX socket, and both QEMUs "
            "get their ends of the connection between them by their monitors",
            standing=UNTOUCHED,
            remedy="run qmpblock on the host of both VMs, and give their UNIX monitors",
        )


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
            remedy="continue it first (cont)",
        )
