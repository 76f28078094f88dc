"""Frozen layers: disks as they were at one instant, where jobs must not read views (K23).

An overlay of ours takes the guest's writes meanwhile, of all disks from one instant on::

    guest -> D                  1. make T, an empty overlay beside D, of each disk
    guest -> T -> D             2. one transaction: all Ds are frozen; nobody is paused
                                3. backup jobs copy each D, and what lies below, into its target
                                4. QEMU closes the targets, which flushes them
    guest -> D                  5. commit each T into its D, and pivot: T goes

T holds what the guest wrote last, from 2 to 5, and comes home at once, whatever fails: it lies
beside D, as `D.qmpblock-RUN`, with a journal that says whether T or D is to be trusted. Should QEMU
die meanwhile, or the host, `qmpblock recover D` has to bring T home before the VM is started again:
D alone is the disk as it was at 2. Each disk is a change of its own, for each comes home alone.

T grows by what the guest writes, on the file system of D, and its content needs room in D once
more. The guest must not run out of room by it: the copy is given up before.
"""

from __future__ import annotations

import asyncio
import posixpath
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from qmpblock.cancellation import task_group, undisturbed
from qmpblock.chains.headers import by_qemu_img
from qmpblock.chains.heldio import check_held_io, must_pause
from qmpblock.chains.home import home_file, open_home, written
from qmpblock.chains.look import opened_as
from qmpblock.chains.overlay import Item, make_overlay, prove, take
from qmpblock.chains.plan import SnapshotPlan
from qmpblock.changes.change import Change
from qmpblock.changes.homing import FrozenCopy
from qmpblock.changes.identity import identify
from qmpblock.changes.settle import settle
from qmpblock.changes.step import Choice
from qmpblock.copying.backups import Backups
from qmpblock.copying.wiretarget import bounded, cut_on_error
from qmpblock.errors import (
    UNTOUCHED,
    DisconnectedError,
    Error,
    GraphError,
    UnsupportedError,
    printable,
)
from qmpblock.graph.jsonname import as_text
from qmpblock.graph.options import key_secret
from qmpblock.graph.writable import check_disk
from qmpblock.host.imagefiles import image_files
from qmpblock.host.space import HostSpace
from qmpblock.names import (
    copy_job,
    create_job,
    left_bitmap,
    lock_names,
    new_run,
    overlay_file,
    overlay_node,
    paused_node,
    pivot_job,
    storage_node,
    target_node,
)
from qmpblock.qemu import ownership

if TYPE_CHECKING:
    from qmpblock.copying.copytarget import CopyTarget
    from qmpblock.copying.plan import CopyPlan
    from qmpblock.graph.model import BlockGraph
    from qmpblock.qemu.connection import Connection

__all__ = ["Frozen", "FrozenBackups", "FrozenDisks", "check_frozen", "frozen", "room_wanted"]

_CLUSTER = 64 << 10  # bytes of an overlay
_RESERVE = 256 << 20  # bytes of the file system that stay free besides
_LOOK = 0.2  # seconds between looks at the free space
_NO_END = "use QEMU 10.0 or newer; or copy it by qemu-img when the VM is off"
_OTHERWISE = (
    "copy the end, which is as consistent: qmpblock copy ADDRESS DISK=TARGET --at end; or use QEMU "
    "10.0 or newer"
)


@dataclass(frozen=True)
class Frozen:
    """A disk that is frozen, or to be.

    :ivar item: its overlay.
    """

    change: Change[FrozenCopy]
    item: Item

    @property
    def record(self) -> FrozenCopy:
        """What its locks and its journal say."""
        return self.change.record


@dataclass(frozen=True)
class FrozenDisks:
    """All of one copy, in the order of its targets."""

    disks: tuple[Frozen, ...]

    @property
    def jobs(self) -> tuple[str, ...]:
        """The ids of the jobs that copy them."""
        return tuple(one.record.helpers[-1] for one in self.disks)

    @property
    def held_here(self) -> bool:
        """Whether QEMU refuses to migrate meanwhile."""
        return any(one.change.held for one in self.disks)

    @property
    def held_guest(self) -> float:
        """Seconds for which a guest's I/O was held at most, as it came home."""
        journals = [one.change.journal for one in self.disks]
        return max((held for one in journals if one for held in one.held), default=0.0)


async def check_frozen(vm: Connection, plan: CopyPlan, graph: BlockGraph) -> str:
    """Refuse what this way is not for, before anything is touched; say how its image is opened.

    :param graph: as it has just been read.
    :raise UnsupportedError: the image is no file on this host, or nobody could open it again after
        a crash, or make an overlay of it; or the guest's device cannot be held.
    :raise Error: there is no room for an overlay.
    """
    otherwise = _OTHERWISE
    try:
        check_disk(plan.device)
        otherwise = _NO_END
        await check_held_io(vm.monitor, plan.device, remedy="")
        otherwise = _OTHERWISE
        active = plan.device.chain.active
        file = await home_file(vm, active)
        how = as_text(await opened_as(vm, active, graph))
        otherwise = ""  # a copy of the end is made in the same way, and with the same key
        await by_qemu_img(vm, _secret(plan), local=True)
    except UnsupportedError as error:
        raise UnsupportedError(
            (
                "blocks are shared"
                if plan.shape.reflink
                else f"QEMU {vm.capabilities} can copy the start of a disk"
            )
            + f" only while the guest's writes go to an overlay beside its image. {error.message}",
            standing=UNTOUCHED,
            remedy="leave --reflink out" if plan.shape.reflink else otherwise or error.remedy,
        ) from None
    wanted = room_wanted([(active.size, 0)])
    _check_room(posixpath.dirname(file), wanted, UNTOUCHED)
    full = plan.shape.allocation == "full"
    whole = full or (plan.format == "raw" and not plan.shape.reflink)
    if whole and plan.kind == "file":
        space = HostSpace.of(posixpath.dirname(plan.file))
        if not space.leaves(plan.size + wanted):
            raise UnsupportedError(
                f"space is to be reserved for all {plan.size} bytes of the copy"
                + (
                    ""
                    if full
                    else f" while it is made, as QEMU {vm.capabilities} does of a raw one"
                )
                + f", what is blank included, and the file system of {printable(plan.file)} has "
                f"{space.free} bytes free",
                standing=UNTOUCHED,
                remedy="make the copy qcow2, and thin, which takes what it holds; or " + _OTHERWISE,
            )
    return how


def _secret(plan: CopyPlan) -> str | None:
    active = plan.device.chain.active
    return key_secret(active) if active.node.encrypted else None


@asynccontextmanager
async def frozen(
    vm: Connection, targets: Sequence[CopyTarget], prepare: Callable[[], Awaitable[None]]
) -> AsyncIterator[FrozenDisks]:
    """Freeze disks as they are now, all at one instant, while the body runs; then bring all home.

    The targets' nodes get names, by which QEMU closes them at the end; their sources are the frozen
    layers. Cancelled or failed, the guest is brought back to its images, with every write.

    :param prepare: looks again, under the locks, whether the disks are what was planned for, and
        opens the targets: before the guest's disks are touched.
    :raise Error: the body's, or an overlay cannot be made, or brought home; what stands is said.
    """
    async with AsyncExitStack() as stack:
        disks: list[Frozen] = []
        lost: list[str] = []
        stack.enter_context(_telling(lost))
        for target in targets:
            one = await _planned(vm, target, stack)
            await one.change.begin()
            stack.enter_context(_hearing(lost))
            await stack.enter_async_context(
                one.change.or_undo(lambda: _away(disks), done=lambda: _back(disks))
            )
            disks.append(one)
        every = FrozenDisks(tuple(disks))
        await stack.enter_async_context(cut_on_error(vm, every.jobs, targets))
        await prepare()
        for one in disks:
            await make_overlay(vm, one.change, one.item, "qcow2", local=True)
        for one in disks:
            await prove(vm, one.change, [one.item])
        devices = [target.plan.device for target in targets]
        await ownership.ask(vm.monitor, devices, standing=None)
        with bounded(targets):
            await undisturbed(take(vm, [one.item for one in disks]))
        yield every
        for target in targets:
            await target.flush(vm)
        with bounded(targets):
            await undisturbed(_come_home(disks))
        for one in disks:
            await undisturbed(one.change.end())


async def _planned(vm: Connection, target: CopyTarget, stack: AsyncExitStack) -> Frozen:
    """Say what is to be made for one disk, and name its target's node for it."""
    plan, run = target.plan, new_run()
    device, active = plan.device, plan.device.chain.active
    home = await home_file(vm, active)
    target.node, target.source = target_node(run, 0), active.node.name
    node, path = overlay_node(run, 0), overlay_file(home, run)
    if plan.sync_of_disk == "full" and plan.asks:
        target.told_by = (active.node.name,)
    nodes = (*target.nodes, node, storage_node(node))
    draws = target.resumed or target.told_by or plan.since is not None
    pauses = await must_pause(vm, device, active.format)
    record = FrozenCopy(
        run=run,
        vm=await identify(vm),
        devices=(device.qom_path,),
        names=(device.name,),
        locks=lock_names([device]),
        job=pivot_job(run),
        helpers=(create_job(run, 0), copy_job(run, 0)),
        top=node,
        top_file=path,
        base=active.node.name,
        base_file=home,
        base_format=active.format,
        base_opened=plan.opened,
        written=written(vm, active, home),
        nodes=(*nodes, paused_node(run)) if pauses else nodes,
        files=(path,),
        images=image_files(vm.monitor.peer_pid, device.chain),
        wires=target.wires,
        drawn=((active.node.name, left_bitmap(target.node)),) if draws else (),
    )
    item = Item(
        SnapshotPlan(device, active, _secret(plan), (), ()),
        path,
        node,
        storage_node(node),
        create_job(run, 0),
        posixpath.basename(home),
        # What the guest writes comes home in its clusters: no larger ones than the image's.
        min(active.node.cluster_size or _CLUSTER, _CLUSTER),
        directory=stack.enter_context(await open_home(vm, active, home)),
    )
    return Frozen(Change(vm, record, beside=Path(home)), item)


async def _come_home(every: Sequence[Frozen]) -> None:
    """Have QEMU close the targets, and bring the overlays home.

    :raise GraphError: somebody else has changed a chain meanwhile.
    """
    for one in every:
        change, record = one.change, one.record
        graph = await settle(change.vm, record, change.journal, Choice.UNDO)
        home = record.active_nodes(graph) in (set(), {record.base})
        if not home and record.top in graph.nodes:  # else the disk has another medium
            raise GraphError(
                f"somebody took a snapshot of {record.names[0]} while an overlay of ours was on "
                "top",
                standing=f"{printable(record.top_file)} is a layer of the chain now, and needed "
                "there",
                remedy="when the disk is idle, commit that layer into the one below: qmpblock "
                "commit ADDRESS DISK --top LAYER --base LAYER",
            )


def _back(every: Sequence[Frozen]) -> str:
    images = ", ".join(printable(one.record.base_file) for one in every)
    seen = [(one.record, one.change.settled) for one in every]
    left = any(graph and record.base not in record.active_nodes(graph) for record, graph in seen)
    above = "on top of somebody's snapshot of " if left else "on "
    return (
        f"there is no copy; the guest is {above}{images}, with every write; nothing of ours is left"
    )


def _away(every: Sequence[Frozen]) -> str:
    overlays = ", ".join(printable(one.record.top_file) for one in every)
    return (
        f"there is no copy. Not everywhere is the guest back on its image: somebody took a "
        f"snapshot above one of the overlays {overlays}, which is a layer of the chain now and "
        "needed there, or unplugged the disk"
    )


@contextmanager
def _hearing(lost: list[str]) -> Iterator[None]:
    """Note what each change says of its images where QEMU has ended."""
    try:
        yield
    except DisconnectedError as error:
        if error.standing is not None:
            lost.append(error.standing)
        raise


@contextmanager
def _telling(lost: list[str]) -> Iterator[None]:
    """Have an error say it of all disks, not of the one whose change ended last."""
    try:
        yield
    except DisconnectedError as error:
        if lost:
            error.standing = "; ".join(dict.fromkeys(reversed(lost)))
        raise


@dataclass
class FrozenBackups(Backups):
    """The backup jobs of frozen layers, and the look-out for the room that the guest needs."""

    of_views: ClassVar[bool] = False
    frozen: Sequence[Frozen] = field(default_factory=tuple)
    _crowded: bool = False

    async def work(self) -> None:
        """Copy all. See `Backups.work`.

        :raise Error: the overlays leave too little room: the copy is to be given up, and what was
            made for it is not kept.
        """
        try:
            async with task_group() as group:
                watch = group.create_task(self._watch_room())
                await super().work()
                watch.cancel()
        finally:
            if self._crowded:
                for target in self.targets:
                    target.keeps = target.resumed

    def sync(self, target: CopyTarget) -> str:
        """Return which layers it is to copy: those of the disk itself, as they are frozen."""
        return target.plan.sync_of_disk

    async def _watch_room(self) -> None:
        while True:
            try:
                self.check_room()
            except Error:
                self._crowded = True
                raise
            await asyncio.sleep(_LOOK)

    def check_room(self) -> None:
        """See that the guest can go on.

        :raise Error: there is too little room on a file system that its writes go to.
        """
        overlays: dict[int, list[tuple[int, int]]] = {}  # by file system
        places: dict[int, str] = {}
        for one in self.frozen:
            file = one.item.file
            try:
                needed = (one.item.plan.active.size, Path(file).stat().st_blocks * 512)
                paths = (posixpath.dirname(file), *(name for name, _ in one.record.written))
                places |= (its := {Path(path).stat().st_dev: path for path in paths})
            except OSError as error:
                raise Error(f"cannot look at {printable(file)}: {error.strerror}") from None
            for device in its:
                overlays.setdefault(device, []).append(needed)
        for device, there in overlays.items():
            _check_room(places[device], room_wanted(there))


def room_wanted(overlays: Sequence[tuple[int, int]]) -> int:
    """Return how many bytes of a file system must be free for overlays to come home from it. Pure.

    What they hold needs room once more, in the images; and they must be able to grow until they are
    home, though to no more than their disks.

    :param overlays: for each, the size of its disk, and the bytes of the host that it takes.
    """
    held = sum(taken for _, taken in overlays)
    growth = sum(max(size + size // 64 + (1 << 20) - taken, 0) for size, taken in overlays)
    return held + min(_RESERVE, growth)


def _check_room(path: str, wanted: int, standing: str | None = None) -> None:
    space = HostSpace.of(path)
    if not space.leaves(wanted):
        raise Error(
            f"the file system of {printable(space.path)} has {space.free} bytes free, and the "
            f"guest's writes need {wanted} there while the copy runs: they go to an overlay, which "
            "then comes home",
            standing=standing,
            remedy="make room there; or copy when the guest writes less; or copy the end, which "
            "needs none there: qmpblock copy ADDRESS DISK=TARGET --at end",
        )
