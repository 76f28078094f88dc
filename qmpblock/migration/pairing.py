"""Whether two VMs fit for a migration, and which disk of the one is which of the other's."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from qmpblock.errors import UNTOUCHED, UnsupportedError
from qmpblock.migration.compare import compare, pairs
from qmpblock.migration.describe import describe, machine_types
from qmpblock.migration.diskterms import DiskTerms
from qmpblock.migration.room import find_room
from qmpblock.names import blocker_name, is_of_run

if TYPE_CHECKING:
    from qmpblock.graph.model import BlockGraph
    from qmpblock.migration.machine import GuestDisk, Machine
    from qmpblock.qemu.connection import Connection

__all__ = ["Pairing", "check_pairing", "describe_both", "written_disks"]


@dataclass(frozen=True)
class Pairing:
    """Two VMs that fit.

    :ivar disks: which of those that are written to is which, by the devices' paths in QEMU's
        object tree: those of one disk need not be the same at both ends.
    :ivar warnings: what is worth acting on.
    """

    disks: tuple[tuple[str, str], ...]
    warnings: tuple[str, ...]


async def check_pairing(
    source: Connection,
    destination: Connection,
    terms: DiskTerms | None = None,
    *,
    graphs: tuple[BlockGraph | None, BlockGraph | None] = (None, None),
    resumed: str = "",
    copied: bool = False,
) -> Pairing:
    """Refuse a migration of which something would come to light only later; nothing is touched.

    Of a pair that fits otherwise the source's disks are mapped, where the destination could be
    short of room.

    :param terms: what is done with the disks; None: they are copied, with all their layers.
    :param graphs: the block graphs of both, where they have just been read.
    :param resumed: the run that is under way, or of an attempt before that is gone on with: what it
        has made is none's harm.
    :param copied: whether the disks are copied by now: they had room.
    :raise UnsupportedError: the two ends do not fit; says all that does not.
    """
    terms = DiskTerms() if terms is None else terms
    here, there = await describe_both(source, destination, graphs)
    found = compare(_without(here, resumed) if resumed else here, there, terms)
    written = written_disks(here, there)
    refused = [one for one in found if one.refused]
    if terms.copies and not copied and not refused:
        refused = list(await find_room(source, written, terms, graphs[0]))
    if refused:
        raise UnsupportedError(
            "the destination does not fit the source:\n"
            + "\n".join(f"  {one.what} ({one.kind.noticed} QEMU would notice)" for one in refused),
            standing=UNTOUCHED,
            remedy="; ".join(dict.fromkeys(one.kind.remedy for one in refused)),
        )
    return Pairing(
        tuple((one.path, other.path) for one, other in written),
        tuple(f"{one.what}: {one.kind.otherwise}" for one in found),
    )


async def describe_both(
    source: Connection,
    destination: Connection,
    graphs: tuple[BlockGraph | None, BlockGraph | None] = (None, None),
) -> tuple[Machine, Machine]:
    """Read what both VMs are, for comparing them.

    :param graphs: the block graphs of both, where they have just been read.
    """
    here, there = await asyncio.gather(
        describe(source, graphs[0]), describe(destination, graphs[1])
    )
    if here.type != there.type:  # else it knows it
        there = replace(there, types=await machine_types(destination.monitor))
    return here, there


def _without(here: Machine, run: str) -> Machine:
    """Return a machine without the jobs of a run, and what keeps it from migrating meanwhile."""
    disks = (
        replace(disk, jobs=tuple(job for job in disk.jobs if not is_of_run(job, run)))
        for disk in here.disks
    )
    blocked = tuple(why for why in here.blocked if blocker_name(run) not in why)
    return replace(here, disks=tuple(disks), blocked=blocked)


def written_disks(here: Machine, there: Machine) -> list[tuple[GuestDisk, GuestDisk]]:
    """Return the disks that are written to."""
    return [both for both in pairs(here, there) if not both[0].read_only]
