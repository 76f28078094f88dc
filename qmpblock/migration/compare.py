"""Whether a guest finds at the destination what it leaves at the source. Pure.

Most of what differs QEMU notices when all is copied and the guest stands, and some of it never. So
everything that a guest or a migration can tell is compared before anything is done.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from qmpblock.errors import printable
from qmpblock.migration.backing import backing_differs, own_images
from qmpblock.migration.devicetree import GuestDevice
from qmpblock.migration.diskterms import DiskTerms
from qmpblock.migration.machine import Block, FileIdentity, GuestDisk, Machine
from qmpblock.migration.mismatch import KINDS, Kind
from qmpblock.migration.properties import FEATURES, GUESTS_OWN, HOSTS_OWN, QUEUES
from qmpblock.migration.space import space_differs

__all__ = ["Finding", "compare", "pairs"]


@dataclass(frozen=True)
class Finding:
    """One thing that speaks against a migration.

    :ivar name: of its kind.
    :ivar what: it is, with what each side shows.
    """

    name: str
    what: str

    @property
    def kind(self) -> Kind:
        """When QEMU would notice, what would happen otherwise, what to do."""
        return KINDS[self.name]

    @property
    def refused(self) -> bool:
        """Whether nothing is begun; else it is a warning."""
        return self.kind.refused


#: Of the source and of both: without these nothing is begun.
_SOURCE_NEEDS = ("dirty-bitmaps", "events", "pause-before-switchover", "return-path")
_BOTH_NEED = ("events",)
#: A stream is in another form with these.
_ALIKE = ("compress", "mapped-ram", "multifd", "postcopy-preempt", "x-colo", "x-ignore-shared")


def compare(
    source: Machine, destination: Machine, terms: DiskTerms | None = None
) -> tuple[Finding, ...]:
    """Say what speaks against migrating one into the other; refusals first.

    :param terms: what is done with the disks; None: they are copied, with all their layers.
    """
    terms = DiskTerms() if terms is None else terms
    found = [Finding(name, what) for name, what in _all(source, destination, terms)]
    return tuple(sorted(found, key=lambda one: not one.refused))


def pairs(source: Machine, destination: Machine) -> tuple[tuple[GuestDisk, GuestDisk], ...]:
    """Return the disks that are at the same place at both ends, empty drives left out."""
    there = {disk.place: disk for disk in destination.disks if disk.place}
    return tuple(
        (disk, there[disk.place])
        for disk in source.disks
        if disk.place in there and disk.size is not None and there[disk.place].size is not None
    )


_Found = Iterator[tuple[str, str]]


def _all(source: Machine, destination: Machine, terms: DiskTerms) -> _Found:
    yield from _states(source, destination)
    yield from _machines(source, destination)
    yield from _cpus(source, destination)
    devices = list(_devices(source, destination))
    yield from devices
    yield from _memory(source, destination, whole=not devices)
    for side, machine in (("source", source), ("destination", destination)):
        for disk in machine.disks:
            if not disk.place:
                yield "disk-place", f"where {disk.describe()} of the {side} is cannot be told"
    own = own_images(source)
    if terms.copies:
        yield from _shared(source)
    for here in source.disks:
        for there in destination.disks:
            if here.place and here.place == there.place:
                yield from _disk(here, there, destination, terms, own)
    yield from _capabilities(source, destination)


def _states(source: Machine, destination: Machine) -> _Found:
    if source.elsewhere:
        yield "source-state", source.elsewhere
    for reason in source.blocked:
        yield "source-blocked", f"QEMU does not migrate the source: {printable(reason)}"
    if destination.status != "inmigrate":
        yield (
            "destination-state",
            (
                f"the destination waits for no migration: query-status says "
                f"{printable(destination.status)}, not inmigrate"
            ),
        )
    elif destination.listens:
        yield (
            "destination-listens",
            "the destination waits for a migration at an address already, or took one in vain",
        )
    elif destination.paused is False:
        yield "destination-runs", "the destination was started without -S"


def _machines(source: Machine, destination: Machine) -> _Found:
    if source.type != destination.type:
        if destination.types and source.type not in destination.types:
            yield (
                "machine-unknown",
                (
                    f"the source is a {printable(source.type)} ({source.qemu}), which the "
                    f"destination's {destination.qemu} does not know"
                ),
            )
        else:
            yield "machine", _differ("the machine type is", source.type, destination.type)
    else:
        differ = _differing(source.options, destination.options)
        if differ:
            yield "machine-options", "options of the machine differ: " + _listed(differ)
        if destination.version[:2] < source.version[:2]:
            yield (
                "older",
                (
                    f"the destination is older ({destination.qemu}) than the source "
                    f"({source.qemu}): "
                    "nobody promises that the one understands all that the other sends"
                ),
            )
    if source.uuid != destination.uuid:
        yield "uuid", _differ("the VM's UUID is", source.uuid, destination.uuid)


def _cpus(source: Machine, destination: Machine) -> _Found:
    differ = _differing(source.features, destination.features)
    if differ:
        named = f"{printable(source.cpu)}, at the destination {printable(destination.cpu)}"
        yield "cpu", f"the CPUs differ ({named}): " + _listed(differ)
    elif source.cpu != destination.cpu:
        yield "cpu-name", _differ("the CPU model is", source.cpu, destination.cpu)
    if source.cpus != destination.cpus:
        yield (
            "cpus",
            f"the source has {len(source.cpus)} CPUs, the destination {len(destination.cpus)}"
            if len(source.cpus) != len(destination.cpus)
            else "the CPUs are at other places, " + _sets(source.cpus, destination.cpus),
        )


def _memory(source: Machine, destination: Machine, *, whole: bool) -> _Found:
    """Compare memory.

    :param whole: whether the devices are the same; else their own blocks say nothing new.
    """
    if (source.memory, source.plugged) != (destination.memory, destination.plugged):
        here, there = (f"{one.memory} + {one.plugged} bytes" for one in (source, destination))
        yield "memory", _differ("the memory (at the start, plugged) is", here, there)
        return
    wrong = []
    for name, block in source.blocks.items():
        other = destination.blocks.get(name)
        if "/" in name and not name.startswith("/") and not whole:
            continue
        if other is None:
            wrong.append(f"{printable(name)} is not there")
        elif not _fits(block, other):
            wrong.append(f"{printable(name)} has {block.used} bytes, there {other.used}")
    if wrong:
        yield "memory-blocks", "blocks of memory differ: " + "; ".join(wrong)


def _fits(block: Block, other: Block) -> bool:
    """Whether the destination's block takes the source's: one that can grow takes what is less."""
    grows = other.used < other.largest
    return block.used <= other.largest if grows else block.used == other.used


def _devices(source: Machine, destination: Machine) -> _Found:
    here = {one.place: one for one in source.devices}
    there = {one.place: one for one in destination.devices}
    unlike: list[str] = []  # places below which nothing is to be said
    for place, device in here.items():
        if any(place.startswith(f"{above}/") for above in unlike):
            continue
        other = there.get(place)
        if other is None:
            unlike.append(place)
            moved = [one for at, one in there.items() if _is_same(device, one) and at not in here]
            at = f"; it has one at {printable(moved[0].where)}" if len(moved) == 1 else ""
            yield "device-missing", f"the destination has no {device.describe()}{at}"
        elif other.type != device.type:
            unlike.append(place)
            yield (
                "device-type",
                (
                    f"at {printable(device.where)} the source has a {device.describe()}, the "
                    f"destination a {other.describe()}"
                ),
            )
        else:
            yield from _device(device, other)
    for place, device in there.items():
        above = place.rpartition("/")[0]
        if place not in here and above not in unlike and (above in here or not above):
            yield "device-extra", f"only the destination has a {device.describe()}"


def _is_same(one: GuestDevice, other: GuestDevice) -> bool:
    return one.type == other.type and one.id == other.id


def _device(here: GuestDevice, there: GuestDevice) -> _Found:
    if here.id != there.id:
        yield "device-id", f"{here.describe()} is called {_or_none(there.id)} at the destination"
    differ = _differing(here.properties, there.properties)
    not_told = HOSTS_OWN | GUESTS_OWN
    counted = {name: both for name, both in differ.items() if name not in not_told}
    of_kind: dict[str, dict[str, tuple[str, str]]] = {}
    for name, both in counted.items():
        kind = (
            "device-queues"
            if name in QUEUES
            else "device-features"
            if name in FEATURES
            else "device-properties"
        )
        of_kind.setdefault(kind, {})[name] = both
    for kind, some in of_kind.items():
        yield kind, f"{here.describe()} differs: " + _listed(some)


def _shared(source: Machine) -> _Found:
    """See to which disks others may write: a mirror does not hear of it."""
    shared = {one.place for one in source.devices if one.properties.get("share-rw") == "true"}
    for disk in source.disks:
        if disk.place in shared and disk.size is not None and not disk.read_only:
            yield "disk-shared", f"{disk.describe()} has share-rw=on"


def _disk(
    here: GuestDisk,
    there: GuestDisk,
    destination: Machine,
    terms: DiskTerms,
    own: Mapping[FileIdentity, str],
) -> _Found:
    name = here.describe()
    if (here.size is None) != (there.size is None):
        at = "source" if there.size is None else "destination"
        yield "disk-medium", f"the drive {name} has a medium at the {at} only"
        return
    if here.size is None:
        return
    if here.size != there.size:
        yield "disk-size", _differ(f"{name} has", f"{here.size} bytes", f"{there.size}")
    if here.read_only != there.read_only:
        at = "destination" if there.read_only else "source"
        yield "disk-read-only", f"{name} can only be read at the {at}"
    if bool(here.iothread) != bool(there.iothread):
        at = "source" if here.iothread else "destination"
        yield "disk-iothread", f"{name} runs in an iothread at the {at} only"
    yield from _bitmaps(here, there, copies=terms.copies)
    known = here.identity is not None and there.identity is not None
    if not terms.copies:
        if known and here.identity != there.identity:
            yield "disk-apart", f"{name} is {printable(there.file)} at the destination"
        return
    if here.read_only:
        return  # it is not copied: both may well have the same
    if known and here.identity == there.identity:
        yield "disk-same", f"{name} is the very same file at both ends"
    elif there.identity is not None and there.identity in own:
        theirs = printable(own[there.identity])
        yield "disk-same", f"{name} would be copied to {theirs}, which a disk of the source is in"
    if known and any(here.identity in (one.files or ()) for one in there.below):
        yield "disk-same", f"{printable(there.file)} lies on {name} itself"
    yield from space_differs(here, there, destination.version, terms.allocation)
    if terms.layers == "top":
        yield from backing_differs(here, there, trusted=terms.same_backing)
    if here.encrypted and not there.encrypted:
        yield "disk-plaintext", f"{name} is encrypted, {printable(there.file)} is not"
    if there.format == "raw" and there.holes is False and destination.version < (10, 0, 0):
        yield "disk-filled", f"{printable(there.file)} is open with discard=ignore"
    if here.snapshots and not here.read_only:
        names = ", ".join(map(printable, here.snapshots))
        yield "snapshot-left", f"{name} holds the internal snapshots {names}"
    if here.jobs:
        jobs = ", ".join(map(printable, here.jobs))
        yield "source-job", f"on {name} of the source runs {jobs}"


def _bitmaps(here: GuestDisk, there: GuestDisk, *, copies: bool) -> _Found:
    """Compare dirty bitmaps; a persistent one in an image that both have is there by itself."""
    mine = () if here.read_only else here.bitmaps
    same = here.read_only or not copies
    left = (*here.lower, *(here.bitmaps if here.read_only else ()))
    for bitmap in left:
        if not (bitmap.persistent and same):
            what = f"the dirty bitmap {printable(bitmap.name)} of {here.describe()} is of a layer"
            yield "bitmap-left", f"{what} that is not written to"
    taken = {bitmap.name for bitmap in there.bitmaps}
    for bitmap in mine:
        named = f"the dirty bitmap {printable(bitmap.name)} of {here.describe()}"
        if bitmap.inconsistent or bitmap.busy:
            yield "bitmap-unusable", f"{named} is {'in use' if bitmap.busy else 'inconsistent'}"
        if bitmap.name in taken or (copies and bitmap.name in there.stored):
            yield "bitmap-exists", f"{named} is there already, in {printable(there.file)}"
        if bitmap.persistent and not there.keeps_bitmaps:
            yield "bitmap-lost", f"{named} is persistent, and {printable(there.format)} stores none"


def _capabilities(source: Machine, destination: Machine) -> _Found:
    for side, machine, needed in (
        ("source", source, _SOURCE_NEEDS),
        ("destination", destination, _BOTH_NEED),
    ):
        for name in needed:
            if name not in machine.capabilities:
                yield "capability-unknown", f"the {side} ({machine.qemu}) does not know {name}"
    for name in _ALIKE:
        here, there = (one.capabilities.get(name, False) for one in (source, destination))
        if here != there:
            on = "source" if here else "destination"
            yield "capability-differs", f"the capability {name} is on at the {on} only"


# -- words


def _differing(here: Mapping[str, str], there: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Return what both have and is not the same. What only one knows is of its version."""
    return {
        name: (here[name], there[name])
        for name in here
        if name in there and here[name] != there[name]
    }


def _listed(differ: Mapping[str, tuple[str, str]]) -> str:
    return "; ".join(
        f"{printable(name)} {_or_none(here)}, at the destination {_or_none(there)}"
        for name, (here, there) in differ.items()
    )


def _differ(what: str, here: str, there: str) -> str:
    return f"{what} {_or_none(here)} at the source, {_or_none(there)} at the destination"


def _sets(here: frozenset[str], there: frozenset[str]) -> str:
    sides = {"source": here - there, "destination": there - here}
    return "; ".join(
        f"at the {side} only: {', '.join(map(printable, sorted(some)))}"
        for side, some in sides.items()
        if some
    )


def _or_none(text: str) -> str:
    return printable(text) if text else "nothing"
