"""A migration that is not made: what speaks against it, what it takes, whether it would end.

Both VMs are asked, and the source's disks are mapped, which takes an export for a moment, as
`MappedDisk.map` does; what the wire carries is measured past all images. What differs is found
first, and costs nobody a second; only a pair that fits is measured.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from qmpblock.errors import Error, printable
from qmpblock.migration.compare import Finding, compare
from qmpblock.migration.diskterms import Allocation, DiskTerms, Layers
from qmpblock.migration.imageserver import image_server
from qmpblock.migration.likeness import check_likeness, reserved_zeros
from qmpblock.migration.means import MigrationMeans
from qmpblock.migration.measure import measure
from qmpblock.migration.pairing import describe_both, written_disks
from qmpblock.migration.predict import (
    HAND_OVER,
    Load,
    Prediction,
    WireSpeed,
    predict,
)
from qmpblock.migration.room import data_of, without_room
from qmpblock.migration.settings import (
    THERE,
    Preset,
    check_channels,
    wanted_at_destination,
    wanted_at_source,
)
from qmpblock.migration.storage import check_can_block
from qmpblock.migration.way import check_seen, way_over
from qmpblock.migration.wirespeed import measure_wire
from qmpblock.names import new_run

if TYPE_CHECKING:
    from qmpblock.migration.machine import GuestDisk
    from qmpblock.migration.over import Over
    from qmpblock.qemu.connection import Connection

__all__ = [
    "PlannedBitmap",
    "PlannedDisk",
    "PlannedMigration",
    "plan_migration",
]


@dataclass(frozen=True)
class PlannedDisk:
    """One disk that would be copied.

    :ivar disk: what people call it at the source.
    :ivar source: the file of its active layer there; `target`: at the destination.
    :ivar size: of the disk, in bytes.
    :ivar layers: all, or the active one alone; `allocation`: what has host space there.
    :ivar data: bytes of it that are to be copied; None where no map can be had: the size counts,
        but for room.
    :ivar written: bytes a second that the guest writes to it.
    """

    disk: str
    source: str
    target: str
    size: int
    data: int | None
    written: float
    layers: Layers = "all"
    allocation: Allocation = "thin"


@dataclass(frozen=True)
class PlannedBitmap:
    """One dirty bitmap that would go along.

    :ivar disk: what people call its disk at the source.
    :ivar persistent: whether the image keeps it.
    """

    disk: str
    name: str
    persistent: bool


@dataclass(frozen=True)
class PlannedMigration:
    """What a migration would be. Get it from `plan_migration`.

    :ivar findings: what speaks against it, refusals first.
    :ivar disks: that would be copied; empty where the images are shared.
    :ivar bitmaps: that would go along.
    :ivar memory: bytes of it; `dirtied`: that the guest writes to a second, None where that is not
        measured.
    :ivar speed: bytes a second that it is limited to; 0: to none.
    :ivar over: by which network disks and memory would go; None: as the monitors.
    :ivar wire: what was measured of the wire; None where it was not, and `unmeasured` says why.
    :ivar prediction: None where it is refused: nothing is measured then.
    :ivar notices: what would be done on request, as its memory begins to go, for it to end.
    :ivar pause: seconds for which the guest would be paused for all of its memory, where that is
        asked for; None where it is not, or cannot be told.
    :ivar storage_daemon: whether one would have the destination's images.
    :ivar warnings: what else is worth acting on.
    """

    findings: tuple[Finding, ...]
    disks: tuple[PlannedDisk, ...] = ()
    bitmaps: tuple[PlannedBitmap, ...] = ()
    memory: int = 0
    dirtied: float | None = None
    speed: int = 0
    over: str | None = None
    wire: WireSpeed | None = None
    unmeasured: str = ""
    prediction: Prediction | None = None
    notices: tuple[str, ...] = ()
    pause: float | None = None
    storage_daemon: bool = False
    warnings: tuple[str, ...] = ()

    @property
    def refused(self) -> bool:
        """Whether it would be refused."""
        return any(one.refused for one in self.findings)


async def plan_migration(
    source: Connection,
    destination: Connection,
    *,
    terms: DiskTerms | None = None,
    speed: int = 0,
    means: MigrationMeans | None = None,
    over: str | None = None,
    storage_daemon: bool = False,
) -> PlannedMigration:
    """Say what a migration would be: what speaks against it, what it takes, whether it would end.

    What the guest writes is measured for a second, if nothing is refused. Cancelling ends it at
    once; nothing is left in either VM.

    :param terms: what is done with the disks; None: they are copied, with all their layers.
    :param speed: bytes a second that it is limited to; 0: to none.
    :param means: what it may do to come to its end.
    :param over: by which network disks and memory would go (`nbds://HOST[:PORT]`), as of
        `migrate`; None: as the monitors.
    :param storage_daemon: whether one is to have the destination's images; without, one has them
        where QEMU would not outlive it otherwise.
    :raise RequestError: `means`, `terms` or `over` cannot be.
    :raise Error: nothing goes `over` there: a migration would fail before anything is copied.
    :raise UnsupportedError: one of both cannot do what `means` say; or a storage daemon that is
        asked for cannot have the images.
    """
    means = MigrationMeans() if means is None else means
    means.check()
    terms = DiskTerms() if terms is None else terms
    terms.check()
    way = None if over is None else way_over(over, source.nbd, destination.nbd)
    check_seen(terms, way)
    if means.write_blocking_after:
        await check_can_block(source)
    check_channels(means, source.capabilities)
    await Preset.of(source.monitor, wanted_at_source(means, speed))
    await Preset.of(destination.monitor, wanted_at_destination(means), THERE)
    here, there = await describe_both(source, destination)
    found = compare(here, there, terms)
    notices = (*means.notices(), *filter(None, [means.pause_notice()]))
    plan = PlannedMigration(
        found, memory=here.memory + here.plugged, speed=speed, notices=notices, over=over
    )
    if plan.refused:
        return plan
    devices = {device.name: device for device in (await source.graph()).disks()}
    wanted = written_disks(here, there) if terms.copies else []
    arriving = {device.name: device for device in (await destination.graph()).disks()}
    images, why = None, ""
    if way is None:
        targets = [arriving[other.name] for _, other in wanted]
        images, why = await image_server(destination, new_run(), targets, wanted=storage_daemon)
    plan = replace(plan, storage_daemon=images is not None, warnings=tuple(filter(None, [why])))
    load = await measure(source, devices.values())
    top = {one.name for one, _ in wanted if one.below and terms.layers == "top"}
    if terms.allocation == "same":
        for one, other in wanted:
            zeros = await reserved_zeros(source, devices[one.name], top=one.name in top)
            check_likeness(destination, arriving[other.name], zeros)
    data = {
        one.name: await data_of(source, devices[one.name], top=one.name in top) for one, _ in wanted
    }
    full = terms.allocation == "full"
    room = {one.name: one.size if full else data[one.name] for one, _ in wanted}
    wire, why = await _wire(source, destination, way)
    plan = replace(
        plan,
        wire=wire,
        unmeasured=why,
        findings=(*without_room(wanted, room), *found),
        disks=tuple(
            replace(
                _disk(one, other, data[one.name], load),
                layers="top" if one.name in top else "all",
                allocation=terms.allocation,
            )
            for one, other in wanted
        ),
        bitmaps=tuple(
            PlannedBitmap(one.name, bitmap.name, bitmap.persistent)
            for one, _ in written_disks(here, there)
            for bitmap in one.bitmaps
        ),
        dirtied=load.memory,
    )
    parameters = await source.monitor.execute("query-migrate-parameters")
    limit = means.downtime_limit or parameters.get("downtime-limit", 300) / 1000
    carried = min(speed or wire.rate, wire.rate) if wire else speed
    expected = predict(
        load,
        data=sum(disk.size if disk.data is None else disk.data for disk in plan.disks),
        memory=plan.memory,
        speed=carried,
        limit=limit,
        latency=wire.latency if wire else 0.0,
    )
    pause = plan.memory / carried + HAND_OVER if means.pause_after and carried else None
    return replace(plan, prediction=expected, pause=pause)


async def _wire(
    source: Connection, destination: Connection, over: Over | None
) -> tuple[WireSpeed | None, str]:
    """Measure the wire; where that cannot be, say why: a migration might go all the same.

    :raise Error: by the network that it was told to take it would not.
    """
    try:
        return await measure_wire(source, destination, over), ""
    except Error as error:
        if over is not None:
            error.standing = "nothing was migrated (--dry-run); a migration would fail as this did"
            raise
        return None, printable(error)


def _disk(here: GuestDisk, there: GuestDisk, data: int | None, load: Load) -> PlannedDisk:
    assert here.size is not None  # `pairs` leaves empty drives out
    written = load.disks.get(here.name, 0.0)
    return PlannedDisk(here.name, here.file, there.file, here.size, data, written)
