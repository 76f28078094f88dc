"""The staged commit: host space for ranges of a live qcow2 or QED image that no layer holds.

A range that is blank, or mere zero clusters, gets clusters of its own in the running disk D,
in place, while the guest writes on (F3). For each slice of the disk::

    guest -> D                          1. make T, an empty overlay beside D, and take a snapshot
    guest -> T -> D                     2. D is frozen: now, and not before, read its map
    guest -> T -> view of D             3. write zeros, as data, into D, where it has nothing or
                                           zeros (`allocation.filling`); D's detect-zeroes is off
    guest -> T -> D                     4. see that D has the clusters
    guest -> D                          5. commit T into D, and pivot: T goes

What the guest writes meanwhile is in T, which comes home at once, whatever fails: T holds the
newest data from 1 to 5. So T lies beside D, as `D.qmpblock-RUN`, with a journal that says
whether T or D is to be trusted; `qmpblock recover` brings T home after a crash.

Where a manager owns the chain, and lends its monitor, it takes the snapshot (1) and commits (5), so
that it knows of T from before the guest writes to it, and starts the VM from there: see
`qmpblock.changes.known`. All between is as ever.

A slice takes as long as its zeros take to be written, and some milliseconds: no step of it looks
at the whole disk.
"""

from __future__ import annotations

import posixpath
from collections.abc import Callable
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING

from qmpblock.allocation.filling import SPAN, Parts, fill
from qmpblock.cancellation import undisturbed
from qmpblock.chains.headers import by_qemu_img
from qmpblock.chains.heldio import check_held_io
from qmpblock.chains.home import home_file, open_home, written
from qmpblock.chains.look import opened_as
from qmpblock.chains.overlay import Item
from qmpblock.chains.owner import Owner, is_asked, manager_names, owner_of
from qmpblock.chains.plan import SnapshotPlan
from qmpblock.changes.change import Change
from qmpblock.changes.identity import identify
from qmpblock.changes.known import move_up
from qmpblock.changes.operations import ManagersStaging, StagedCommit
from qmpblock.changes.record import PIVOTED
from qmpblock.changes.settle import settle
from qmpblock.changes.step import Choice
from qmpblock.errors import (
    UNTOUCHED,
    Error,
    GraphError,
    UnsupportedError,
    printable,
)
from qmpblock.graph.jsonname import as_text, from_text
from qmpblock.graph.opened import alone
from qmpblock.graph.options import key_secret
from qmpblock.host.imagefiles import image_files
from qmpblock.host.ourfiles import Directory
from qmpblock.host.qemuimg import QemuImg
from qmpblock.host.space import HostSpace
from qmpblock.managers import Work
from qmpblock.mapping import check_active, other_active
from qmpblock.names import (
    create_job,
    lock_names,
    new_run,
    overlay_file,
    overlay_node,
    paused_node,
    pivot_job,
    storage_node,
)
from qmpblock.qemu import ownership
from qmpblock.sizes import Amount
from qmpblock.speed import Speed

if TYPE_CHECKING:
    from qmpblock.mapping import MappedDisk
    from qmpblock.ranges import Ranges

__all__ = ["SLICE", "check_staged", "check_staging", "reserve_by_staging"]

SLICE = 256 << 20
"""Bytes that one slice reserves, at most."""

_SMALLEST = 1 << 20  # bytes of a slice at a low speed
_CLUSTER = 64 << 10  # bytes, QEMU's default of qcow2
_RESERVE = 64 << 20  # bytes of the file system that stay free besides


async def reserve_by_staging(
    disk: MappedDisk,
    where: Ranges,
    *,
    slice_size: int = SLICE,
    speed: Speed | None = None,
    tell: Callable[[int, int], None] | None = None,
) -> tuple[int, float, Ranges]:
    """Give host space to what no layer holds in some ranges, many of them in one slice.

    Returns how many bytes got it, the longest time in seconds for which the guest's I/O was
    held by a pivot, and the zero clusters that had host space already.

    Cancelled or failed, the overlay of the slice under way first comes home; what was
    reserved by then stays.

    :param where: whole clusters, at least one; the last may be cut by the disk's end.
    :param tell: is called with bytes done and bytes found to do.
    """
    from qmpblock.ranges import Ranges

    vm = disk.vm
    await disk.refresh()
    active = disk.chain.active
    file = await check_staging(disk)
    secret = key_secret(active) if active.node.encrypted else None
    await by_qemu_img(vm, secret, local=True)  # or refuse
    owner = await owner_of(vm, Work("reserve", active.file))
    run = new_run()
    device = disk.device
    how = as_text(await opened_as(disk.vm, active))
    overlay = overlay_file(file, run)
    node = overlay_node(run, 0)
    parts = Parts(run, overlay)
    record = StagedCommit(
        run=run,
        vm=await identify(vm),
        devices=(device.qom_path,),
        names=(device.name,),
        locks=lock_names([device]),
        job=pivot_job(run),
        helpers=(create_job(run, 0), parts.job, parts.making),
        top=node,
        top_file=overlay,
        base=active.node.name,
        base_file=file,
        base_format=active.format,
        base_opened=how,
        written=written(vm, active, file),
        detect_zeroes="" if active.node.detect_zeroes == "off" else active.node.detect_zeroes,
        nodes=(node, storage_node(node), *parts.nodes),
        files=(overlay, *parts.files),
        images=image_files(vm.monitor.peer_pid, disk.chain),
    )
    if is_asked(vm):
        record = await _by_its_manager(disk, record)
    change = Change(vm, record, beside=Path(file))
    done, held, had = 0, 0.0, [Ranges()]
    speed = speed or Speed()
    if speed.rate:
        slice_size = min(slice_size, max(speed.rate, _SMALLEST))
    cluster = active.node.cluster_size or 65536
    slice_size = max(cluster, slice_size - slice_size % cluster)
    with await open_home(vm, active, file) as directory:
        await change.begin()
        async with change.or_undo(
            lambda: (
                f"{done} bytes were reserved. The guest is not back on {printable(file)}: the "
                f"overlay {printable(overlay)} is a layer of the chain now, and needed there "
                "(of a snapshot above it, say), or somebody unplugged the disk"
            ),
            done=lambda: (
                f"the guest is {_back(change)}{printable(file)}, with every write; {done} bytes "
                "were reserved and stay so; nothing of ours is left"
            ),
        ):
            left = await _blank(disk, where)
            end = int(where.stops[-1])

            def copied(now: int) -> None:
                if tell is not None:
                    tell(done + now, done + max(now, left.total))

            while left:
                size = min(slice_size, left.total)
                await speed.wait(size)
                _check_space(file, size)
                copied(0)
                where = where.clip(int(left.starts[0]), end)
                chosen, finished = await _slice(
                    disk, change, owner, where, slice_size, had, copied, directory
                )
                done += chosen.total
                held = max([held, *(change.journal.held if change.journal else ())])
                check_active(disk, active)
                if finished:
                    left = Ranges()  # what the live map shows beyond has space already
                elif chosen:
                    left = left.clip(int(chosen.stops[-1]), end)
                copied(0)
            await undisturbed(change.end())
    return done, held, reduce(Ranges.union, had)


def _back(change: Change[StagedCommit]) -> str:
    """Say where a guest is that no overlay of ours keeps from its image; what is meant follows."""
    graph, record = change.settled, change.record
    if graph is not None and record.base not in record.active_nodes(graph):
        return "on top of somebody's snapshot of "
    return "back on "


async def _by_its_manager(disk: MappedDisk, record: StagedCommit) -> ManagersStaging:
    """Return the same, done by the manager that owns the chain: the overlay's nodes are its."""
    [name] = await manager_names(disk.vm, [disk.device])
    its = (record.top, storage_node(record.top))
    return record.to(
        ManagersStaging,
        job="",
        helpers=record.helpers[1:],
        nodes=(*(node for node in record.nodes if node not in its), paused_node(record.run)),
        top="",
        known_as=name,
    )


async def check_staging(disk: MappedDisk) -> str:
    """Refuse what this way is not for; return the active image's path here.

    :raise UnsupportedError: another format, or an image that is not on this host.
    :raise DisconnectedError: QEMU has gone meanwhile.
    """
    active = disk.chain.active
    if active.format not in ("qcow2", "qed"):
        raise UnsupportedError(
            f"host space for {active.format} images cannot be had while they are in use; for "
            "raw, luks, qcow2 and qed it can",
            standing=UNTOUCHED,
        )
    return await home_file(disk.vm, active)


async def check_staged(disk: MappedDisk) -> str:
    """Refuse what a staged commit is not for, before anything is touched; return its path here.

    :raise UnsupportedError: as `check_staging`, or nobody could open the image again after a
        crash, or make an overlay of it, or the guest's device cannot be held.
    """
    file = await check_staging(disk)
    active = disk.chain.active
    await opened_as(disk.vm, active)
    secret = key_secret(active) if active.node.encrypted else None
    await by_qemu_img(disk.vm, secret, local=True)
    if is_asked(disk.vm):
        await _check_lent(disk, secret)
    await check_held_io(
        disk.vm.monitor,
        disk.device,
        remedy="convert it with preallocation=full when the VM is off (qemu-img convert -o); "
        "thin allocation works",
    )
    return file


async def _check_lent(disk: MappedDisk, secret: str | None) -> None:
    """Refuse what the manager that owns the chain is not asked for.

    :raise UnsupportedError: it is that; nothing was touched.
    """
    active = disk.chain.active
    what = ""
    if secret is not None:
        what = "is encrypted, and libvirt would have to be told the key of its overlay"
    for bitmap in active.node.bitmaps:
        what = (
            f"has the dirty bitmap {printable(bitmap.name)}, and libvirt has its own way with those"
        )
    if what:
        raise UnsupportedError(
            f"{active.describe()} {what}",
            standing=UNTOUCHED,
            remedy="thin allocation works; a checkpoint's bitmap goes with virsh checkpoint-delete",
        )
    await manager_names(disk.vm, [disk.device])


def _check_space(file: str, length: int) -> None:
    """See that the slice, and a reserve, is free."""
    keep = Amount(_RESERVE)
    both = [HostSpace.of(path, keep) for path in (file, str(Path(file).parent))]  # may be a link
    space = min(both, key=lambda one: one.free)
    if not space.leaves(length):
        raise Error(
            f"the file system of {printable(file)} has {space.free} bytes free; reserving the next "
            f"{length} takes {length + _RESERVE}",
            remedy="make room, then run it again: it goes on where it was",
        )


async def _blank(disk: MappedDisk, where: Ranges) -> Ranges:
    """Return what of the ranges is still of interest, on the live map.

    Only to know whether a slice is worth it: what is reserved is chosen on the frozen map.
    """
    first = int(where.starts[0])
    seen = await disk.map(first, int(where.stops[-1]) - first)
    return where & (seen.holes() | seen.where(depth=0, present=True, zero=True, data=False))


async def _slice(
    disk: MappedDisk,
    change: Change[StagedCommit],
    owner: Owner,
    where: Ranges,
    size: int,
    had: list[Ranges],
    tell: Callable[[int], None],
    directory: Directory,
) -> tuple[Ranges, bool]:
    """Reserve up to `size` bytes of the ranges; return which, and whether there are no more.

    :param had: is added to by `_choose`.
    :param tell: is called with the bytes of them that are stored.
    :param directory: that of the image.
    """
    vm, record, journal = disk.vm, change.record, change.journal
    assert journal is not None  # begin() wrote it
    await disk.refresh()
    active = disk.chain.active
    if active.node.name != record.base:
        raise other_active(disk.name)
    if disk.device.jobs or as_text(await opened_as(vm, active)) != record.base_opened:
        raise GraphError(f"somebody else is at work on {disk.name}")
    for left in filter(lambda one: directory.status(posixpath.basename(one)), record.files):
        # Were it taken for the next one, a crash would bring old data home.
        raise Error(f"a file of the last slice is still there: {printable(left)}")
    journal.restart()
    journal.add(**{PIVOTED: False})
    plan = SnapshotPlan(
        disk.device,
        active,
        key_secret(active) if active.node.encrypted else None,
        (),
        (),
    )
    item = Item(
        plan,
        record.top_file,
        record.top,
        storage_node(record.top),
        create_job(record.run, 0),
        posixpath.basename(record.base_file),
        # What the guest writes comes home in its clusters: no larger ones than the image's.
        min(active.node.cluster_size or _CLUSTER, _CLUSTER),
        directory=directory,
    )
    await owner.make(change, item, "qcow2")
    await owner.prove(change, [item])
    await ownership.ask(vm.monitor, [disk.device], standing=None)
    if isinstance(record, ManagersStaging):
        await undisturbed(move_up(vm, record, journal, record.known_as))
    else:
        await undisturbed(owner.take([item]))
    chosen, finished = await _choose(disk, change, where, size, had)
    item = replace(item, node=disk.chain.active.node.name)
    if chosen:
        await fill(vm, change, item, disk.chain.layers[1], chosen, tell)
        await _prove(disk, item.node, chosen)
    # The overlay comes home, and goes; all that is left is removed.
    await undisturbed(settle(vm, record, journal, Choice.UNDO))
    await disk.refresh()
    layers = [layer.node.name for layer in disk.chain.layers]
    if item.node in layers or record.base not in layers:
        raise GraphError(
            f"{disk.name} goes on in an overlay of ours: its manager could not bring it home"
            if layers[0] == item.node
            else f"somebody took a snapshot of {disk.name} while an overlay of ours was on top",
            standing=f"{printable(record.top_file)} is a layer of the chain now, and needed there",
            remedy="when the disk is idle, commit that layer into the one below: qmpblock commit "
            "ADDRESS DISK --top LAYER --base LAYER",
        )
    zeroes = disk.chain.layers[layers.index(record.base)].node.detect_zeroes
    if record.detect_zeroes not in ("", zeroes):
        raise Error(
            f"QEMU does not give {disk.name} its detect-zeroes={record.detect_zeroes} back",
            remedy="nothing is lost by it, but the guest's zeros take space from now on; "
            "blockdev-reopen can set it",
        )
    return chosen, finished


async def _choose(
    disk: MappedDisk, change: Change[StagedCommit], where: Ranges, size: int, had: list[Ranges]
) -> tuple[Ranges, bool]:
    """Choose, on the map of the frozen image, what gets host space; whether that is the last.

    The map is read as far as it takes: a few slices on, where there is nothing to choose.

    :param had: what has it already although it is mere zeros is added to it.
    """
    from qmpblock.ranges import Ranges

    await disk.refresh()
    frozen = disk.chain.layers[min(1, len(disk.chain.layers) - 1)]
    if frozen.node.name != change.record.base or frozen is disk.chain.active:
        raise GraphError(f"somebody else is at work on {disk.name}")
    cluster = frozen.node.cluster_size or 65536
    chosen, reach = Ranges(), size
    while where and chosen.total < size:
        window = where.lowest(reach)
        first = int(window.starts[0])
        seen = await disk.map(first, int(window.stops[-1]) - first)
        # In T's map the frozen image is at depth 1. What T holds already the guest has written.
        blank = seen.where(depth=seen.layers - 1, present=False)
        zeros = seen.where(depth=1, present=True, zero=True, data=False)
        wanted = ((blank | zeros) & window).align_in(cluster, frozen.size)
        if zeros & wanted:
            had.append(wanted & await _reserved(disk, change.record.base_opened, zeros & wanted))
            wanted = wanted - had[-1]
        chosen = chosen | wanted
        where = where - window
        reach *= 2
    some = chosen.lowest(size)
    if some:
        some = some.clip(int(some.starts[0]), SPAN - SPAN % cluster)
    return some, not where and some == chosen


async def _reserved(disk: MappedDisk, base: str, wanted: Ranges) -> Ranges:
    """Return where zero clusters have host space already, which only qemu-img tells.

    :param base: how the frozen image is opened.
    :param wanted: what is of interest; the answer is of no more than its span.
    """
    from qmpblock.ranges import Ranges

    frozen = disk.chain.layers[1]
    if frozen.node.encrypted:
        return Ranges()  # not readable here; to reserve them again does no harm
    fmt, first = frozen.format, int(wanted.starts[0])
    part = (first, int(wanted.stops[-1]) - first)
    seen = await QemuImg(stall=disk.vm.stall).map(
        alone(from_text(base)), [fmt], shared=True, part=part, vm=disk.vm.monitor.peer_pid
    )
    return seen.where(present=True, reserved=True)


async def _prove(disk: MappedDisk, top: str, chosen: Ranges) -> None:
    """See that the frozen image holds data there now: zeros with space of their own.

    Only here can it be seen for certain: later the guest may discard what it likes.
    """
    await disk.refresh()
    if disk.chain.layers[0].node.name != top:
        return  # somebody took a snapshot; that is said once it is known where it all ended
    first = int(chosen.starts[0])
    seen = await disk.map(first, int(chosen.stops[-1]) - first)
    left = chosen - seen.where(depth=1, data=True) - seen.where(depth=0, present=True)
    if left:
        raise Error(
            f"QEMU did not store {left.total} bytes of the zeros that were to reserve space in "
            f"{disk.name}",
        )
