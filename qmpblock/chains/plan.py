"""What a snapshot, stream or commit will do to a chain, or why it may not. Pure.

Everything that can be known to go wrong is refused here, before anything is touched:

- wrong order, wrong sizes, layers that something else uses, jobs that run on the disk;
- plaintext of an encrypted layer that would land in one that is not (safety rule 8);
- the silent corruption by short middle images (K20). Where a layer that leaves the chain
  is shorter than the one above it and the one below, it hides what lies below past its end::

      above    |aa..........|         guest past the short layer's end: zeros
      short    |bb..|
      below    |cccccccccccc|         once the short one is gone: c

  QEMU does not copy those zeros. They are made explicit in the layer above first
  (`Hidden`), which can only be done where that is the active one.

Dirty bitmaps go with the layers that hold them. Which are carried over, and which are lost,
is part of the plan.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

from qmpblock.errors import (
    UNTOUCHED,
    BusyError,
    GraphError,
    InUseError,
    RequestError,
    UnsupportedError,
    printable,
)
from qmpblock.graph.backingname import check_found, name_of_base
from qmpblock.graph.layeruse import check_bitmaps, check_readers, overlays_of
from qmpblock.graph.model import BlockGraph, Chain, DiskDevice, Layer
from qmpblock.graph.options import key_secret
from qmpblock.graph.places import Places
from qmpblock.graph.sharedfiles import second_nodes
from qmpblock.graph.writable import check_disk, check_sound

__all__ = [
    "CommitPlan",
    "Hidden",
    "Merge",
    "NewBitmap",
    "SnapshotPlan",
    "StreamPlan",
    "check_chain",
    "check_idle",
    "plan_commit",
    "plan_snapshot",
    "plan_stream",
]

_RECORDERS = ("qcow2", "qed")  # formats whose recorded backing file QEMU can change


@dataclass(frozen=True)
class Hidden:
    """A range that reads as zeros only because the layer at `depth` is too short for it."""

    depth: int
    start: int
    stop: int


@dataclass(frozen=True)
class NewBitmap:
    """A dirty bitmap to add, so that recording goes on under the same name."""

    node: str
    name: str
    granularity: int
    persistent: bool


@dataclass(frozen=True)
class Merge:
    """Bits to take over into a bitmap of the same name, from a node that leaves the chain."""

    target: str
    source: str
    name: str


@dataclass(frozen=True)
class StreamPlan:
    """A stream into `top`, down to but without `base` (None: everything below).

    :ivar leaving: the layers that leave the chain, the uppermost first; none: nothing to do.
    :ivar backing_name: what `top` will record as its backing file; None for none.
    :ivar names: what each of `leaving` is called now; None where no name leads to its file.
    """

    device: DiskDevice
    top: Layer
    base: Layer | None
    leaving: tuple[Layer, ...]
    backing_name: str | None = None
    hidden: tuple[Hidden, ...] = ()
    merges: tuple[Merge, ...] = ()
    warnings: tuple[str, ...] = ()
    names: tuple[str | None, ...] = ()


@dataclass(frozen=True)
class CommitPlan:
    """A commit of `top`, and all between, into `base`.

    :ivar leaving: `top` down to just above `base`; none: nothing to do.
    :ivar above: the layer that will have `base` as its backing; None for an active commit,
        which pivots: `base` becomes the active layer.
    :ivar backing_name: what `above` will record as its backing file.
    :ivar names: as in `StreamPlan`.
    """

    device: DiskDevice
    top: Layer
    base: Layer
    leaving: tuple[Layer, ...]
    above: Layer | None = None
    backing_name: str | None = None
    hidden: tuple[Hidden, ...] = ()
    bitmaps: tuple[NewBitmap, ...] = ()
    warnings: tuple[str, ...] = ()
    names: tuple[str | None, ...] = ()

    @property
    def pivots(self) -> bool:
        """Whether the guest's writes land in another layer afterwards."""
        return self.above is None


@dataclass(frozen=True)
class SnapshotPlan:
    """An overlay over the active layer of one disk.

    :ivar key_secret: the id of the secret object that encrypts the active layer.
    :ivar bitmaps: to add to the overlay, with an empty `node`.
    """

    device: DiskDevice
    active: Layer
    key_secret: str | None
    bitmaps: tuple[NewBitmap, ...]
    warnings: tuple[str, ...]


def plan_stream(
    graph: BlockGraph,
    device: DiskDevice,
    top: str | None = None,
    base: str | None = None,
    places: Places | None = None,
) -> StreamPlan:
    """Plan a stream.

    :param top: the LAYER that is written to; the active one by default.
    :param base: the LAYER to stop above; by default none.
    :param places: where the files are, as far as that can be seen.
    :raise RequestError: no such layers, wrong order, or not possible safely.
    :raise BusyError: a job runs on the disk.
    """
    chain = device.chain
    into = chain.active if top is None else chain.layer(top)
    keep = None if base is None else chain.layer(base)
    if keep is not None and keep.depth <= into.depth:
        raise RequestError(
            f"the base {keep.describe()} does not lie below {into.describe()}, which would "
            "be written to",
            standing=UNTOUCHED,
            remedy=_order(chain),
        )
    stop = len(chain.layers) if keep is None else keep.depth
    leaving = chain.layers[into.depth + 1 : stop]
    if not leaving:
        return StreamPlan(device, into, keep, ())
    check_idle(device)
    check_disk(device)
    check_sound(into)
    check_bitmaps(graph, _nodes(leaving), standing=UNTOUCHED)
    _check_encryption(leaving, into)
    _check_recorder(into)
    if into.depth:
        _check_unshared(graph, device, into, places or {})
    check_readers(graph, device, "stream", into.node.name, "", standing=UNTOUCHED)
    merges, warnings = _bitmaps_of_stream(into, leaving)
    return StreamPlan(
        device,
        into,
        keep,
        leaving,
        backing_name=None if keep is None else name_of_base(chain, into, keep, places or {}),
        hidden=() if keep is None else _hidden(into, leaving, keep),
        merges=merges,
        warnings=(*warnings, *_snapshots_lost(leaving)),
    )


def plan_commit(
    graph: BlockGraph,
    device: DiskDevice,
    top: str | None = None,
    base: str | None = None,
    places: Places | None = None,
) -> CommitPlan:
    """Plan a commit.

    :param top: the uppermost LAYER to commit; the active one by default.
    :param base: the LAYER that takes it all; by default the lowest (as QEMU has it).
    :param places: where the files are, as far as that can be seen.
    :raise RequestError: no such layers, wrong order or sizes, or not possible safely.
    :raise BusyError: a job runs on the disk; an InUseError: somebody else uses one of the layers.
    """
    chain = device.chain
    first = chain.active if top is None else chain.layer(top)
    last = chain.layers[-1] if base is None else chain.layer(base)
    if first.depth == last.depth and (top is None or base is None):
        return CommitPlan(device, first, last, ())  # idempotent: one layer is left
    if last.depth <= first.depth:
        raise RequestError(
            f"the base {last.describe()} does not lie below the top {first.describe()}",
            standing=UNTOUCHED,
            remedy=_order(chain),
        )
    leaving = chain.layers[first.depth : last.depth]
    above = chain.layers[first.depth - 1] if first.depth else None
    check_idle(device)
    check_disk(device)
    check_sound(last)
    _check_encryption(leaving, last)
    for layer in (*leaving, last):
        _check_unshared(graph, device, layer, places or {})
    check_readers(graph, device, "commit", first.node.name, last.node.name, standing=UNTOUCHED)
    check_bitmaps(graph, _nodes(leaving), standing=UNTOUCHED)
    if above is not None:
        check_sound(above)  # its header will name another backing image
        _check_recorder(above)
    if above is None and last.size > first.size:
        raise RequestError(
            f"the base {last.describe()} is larger ({last.size} bytes) than the disk "
            f"({first.size}); after the pivot the guest's disk would have another size",
            standing=UNTOUCHED,
            remedy="resize the disk to the base's size first (block_resize)",
        )
    if above is None:
        check_found(last, places or {})
    bitmaps, warnings = _bitmaps_of_commit(leaving, last)
    return CommitPlan(
        device,
        first,
        last,
        leaving,
        above,
        backing_name=None if above is None else name_of_base(chain, above, last, places or {}),
        hidden=() if above is None else _hidden(above, leaving, last),
        bitmaps=bitmaps,
        warnings=(*warnings, *_snapshots_lost(leaving)),
    )


def plan_snapshot(graph: BlockGraph, device: DiskDevice, fmt: str) -> SnapshotPlan:
    """Plan an overlay of format `fmt`.

    :raise RequestError: the disk, or this format, cannot have one.
    :raise BusyError: a job runs on the disk.
    """
    chain = device.chain
    active = chain.active
    check_idle(device)
    check_disk(device)
    if fmt not in ("qcow2", "qed"):
        raise UnsupportedError(
            f"an overlay of format {printable(fmt)} cannot be made; qcow2 and qed can",
            standing=UNTOUCHED,
        )
    secret = None
    if active.node.encrypted:
        secret = key_secret(active)
        if fmt != "qcow2":
            raise UnsupportedError(
                f"{active.describe()} is encrypted, and an overlay of format {fmt} cannot be",
                standing=UNTOUCHED,
                remedy="make the overlay qcow2",
            )
    bitmaps, warnings = [], []
    for bitmap in active.node.bitmaps:
        if bitmap.recording and not bitmap.inconsistent:
            if bitmap.persistent and fmt != "qcow2":
                warnings.append(
                    f"the dirty bitmap {printable(bitmap.name)} goes on in the overlay, but not "
                    f"persistently: {fmt} cannot store it"
                )
            keep = bitmap.persistent and fmt == "qcow2"
            bitmaps.append(NewBitmap("", bitmap.name, bitmap.granularity, keep))
    return SnapshotPlan(device, active, secret, tuple(bitmaps), tuple(warnings))


def _order(chain: Chain) -> str:
    listed = "".join(f"\n  {layer.describe()}" for layer in chain.layers)
    return f"the layers are, the active one first:{listed}"


def check_idle(device: DiskDevice, beside: Collection[str] = ()) -> None:
    """Refuse to work beside a job.

    :param beside: the ids of those that are gone on with.
    :raise BusyError: one runs on the disk.
    """
    for job in device.jobs:
        if job.id in beside:
            continue
        raise BusyError(
            f"the job {printable(job.id)} ({printable(job.type)}, {printable(job.status)}) runs "
            f"on {device.name}",
            standing=UNTOUCHED,
            remedy="wait for its end; if its controller died: qmpblock recover ADDRESS"
            if job.ours
            else "it does not end by itself: have whoever started it go on with it, or end it"
            if job.status == "paused"
            else "wait for its end, or have whoever started it end it",
        )


def check_unchanged(graph: BlockGraph, before: DiskDevice, beside: Collection[str] = ()) -> None:
    """See, under the locks, that a disk is as it was planned for, and no job is on it.

    :param beside: see `check_idle`.
    :raise BusyError: one is.
    :raise GraphError: its chain is another one.
    """
    check_idle(graph.device(before.qom_path), beside)
    check_chain(graph, before)


def check_chain(graph: BlockGraph, before: DiskDevice) -> None:
    """See that a disk has the chain that it was planned for.

    :raise GraphError: it has another one.
    """
    if graph.device(before.qom_path).chain.shape != before.chain.shape:
        raise GraphError(
            f"the chain of {before.name} has just been changed by somebody else",
            remedy="look at it, then try again: qmpblock disks ADDRESS",
        )


def _nodes(layers: Iterable[Layer]) -> list[str]:
    return [node.name for layer in layers for node in layer.nodes]


def _check_encryption(sources: Iterable[Layer], target: Layer) -> None:
    for layer in sources:
        if layer.node.encrypted and not target.node.encrypted:
            raise UnsupportedError(
                f"{layer.describe()} is encrypted and {target.describe()} is not: the plaintext of "
                "the one would be stored in the other",
                standing=UNTOUCHED,
            )


def _check_recorder(layer: Layer) -> None:
    """Refuse to give a layer another backing image where its header could not say so.

    QEMU relinks the chain first, and fails afterwards: the header would tell another chain.
    """
    if layer.format not in _RECORDERS:
        raise UnsupportedError(
            f"{layer.describe()} would get another backing image, and QEMU cannot record another "
            f"in the header of a {printable(layer.format)} image",
            standing=UNTOUCHED,
            remedy="commit the active layer instead, or copy the disk into a qcow2 image",
        )


def _check_unshared(graph: BlockGraph, device: DiskDevice, layer: Layer, places: Places) -> None:
    """Refuse to change a layer that something else depends on too.

    QEMU refuses some of it, by its permissions; it silently rewires both chains where two
    disks share a middle layer, and changes the content of an overlay that no device uses.
    """
    for other in graph.disks():
        if other.qom_path == device.qom_path:
            continue
        for theirs in other.chain.layers:
            if theirs.node.name == layer.node.name:
                raise InUseError(
                    f"{layer.describe()} is also a layer of {other.name}, which this would change",
                    standing=UNTOUCHED,
                )
    for node in second_nodes(graph, layer, places):
        disks = [one.name for one in graph.devices if node.name in one.node_names()]
        what = f"is also a layer of {', '.join(disks)}" if disks else "is open a second time"
        raise InUseError(
            f"{layer.describe()} {what}, by the node {printable(node.name)}, which this would "
            "change",
            standing=UNTOUCHED,
            remedy="unplug that disk, or remove that node, if nobody needs it",
        )
    for use in overlays_of(graph, device, layer):
        raise InUseError(
            f"{layer.describe()} is used by {use.what} too, which this would change",
            standing=UNTOUCHED,
            remedy=use.remedy,
        )


def _hidden(above: Layer, leaving: Sequence[Layer], below: Layer) -> tuple[Hidden, ...]:
    """Find what the layers that leave hide by being short (K20).

    :raise UnsupportedError: it cannot be made explicit, because `above` is not the active one.
    """
    hidden = []
    for layer in leaving:
        if layer.depth == above.depth:
            continue
        stop = min(above.size, below.size)
        if layer.size < stop:
            hidden.append(Hidden(layer.depth, layer.size, stop))
    if hidden and above.depth:
        short = next(layer for layer in leaving if layer.depth == hidden[0].depth)
        raise UnsupportedError(
            f"{short.describe()} is shorter ({short.size} bytes) than {above.describe()} and "
            f"{below.describe()}; without it, where the guest reads zeros now, old data of "
            f"{below.describe()} would appear. QEMU does not prevent it, and we can only in the "
            "active layer",
            standing=UNTOUCHED,
            remedy="stream into the active layer, or commit the active layer too",
        )
    return tuple(hidden)


def _bitmaps_of_stream(
    top: Layer, leaving: Iterable[Layer]
) -> tuple[tuple[Merge, ...], tuple[str, ...]]:
    own = {bitmap.name: bitmap for bitmap in top.node.bitmaps}
    merges, warnings = [], []
    for layer in leaving:
        for bitmap in layer.node.bitmaps:
            target = own.get(bitmap.name)
            usable = not (bitmap.inconsistent or bitmap.busy)
            if target and usable and not (target.inconsistent or target.busy):
                merges.append(Merge(top.node.name, layer.node.name, bitmap.name))
            else:
                warnings.append(_lost(layer, bitmap.name))
    return tuple(merges), tuple(warnings)


def _bitmaps_of_commit(
    leaving: Iterable[Layer], base: Layer
) -> tuple[tuple[NewBitmap, ...], tuple[str, ...]]:
    """Have each bitmap that records go on in the base.

    A bitmap that records in the base while the commit writes to it gets every cluster that
    is committed, which are at least those that the bitmap above has.
    """
    below = {bitmap.name: bitmap for bitmap in base.node.bitmaps}
    added: dict[str, NewBitmap] = {}
    warnings = []
    storable = base.format == "qcow2"
    for layer in leaving:
        for bitmap in layer.node.bitmaps:
            kept = below.get(bitmap.name)
            if kept is not None and kept.recording and not kept.inconsistent:
                continue
            if kept is not None or not bitmap.recording or bitmap.inconsistent:
                warnings.append(_lost(layer, bitmap.name))
            elif bitmap.name not in added:
                if bitmap.persistent and not storable:
                    warnings.append(
                        f"the dirty bitmap {printable(bitmap.name)} goes on in {base.describe()}, "
                        f"but not persistently: {base.format} cannot store it"
                    )
                keep = bitmap.persistent and storable
                added[bitmap.name] = NewBitmap(
                    base.node.name, bitmap.name, bitmap.granularity, keep
                )
    return tuple(added.values()), tuple(warnings)


def _lost(layer: Layer, name: str) -> str:
    return f"the dirty bitmap {printable(name)} of {layer.describe()} ends with that layer"


def _snapshots_lost(leaving: Iterable[Layer]) -> Iterator[str]:
    """Say which internal snapshots nobody reaches any more through the disk."""
    for layer in leaving:
        if layer.node.snapshots:
            names = ", ".join(printable(name) for name in layer.node.snapshots)
            yield (
                f"{layer.describe()} holds internal snapshots (savevm): {names}. They stay in that "
                "file, and the VM cannot load them when it has left the chain"
            )
