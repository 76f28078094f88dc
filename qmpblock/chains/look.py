"""What a stream or a commit is about to do: looked at, refused, and put into its record.

Before anything is touched, and by what this process sees of the VM and of its files; the rules are
in `qmpblock.chains.plan`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qmpblock.chains.heldio import check_held_io, must_pause
from qmpblock.chains.plan import (
    CommitPlan,
    NewBitmap,
    StreamPlan,
    check_chain,
)
from qmpblock.chains.settings import discard_to_restore, lost_by_commit
from qmpblock.chains.storedbitmaps import check_frozen_ones
from qmpblock.changes.identity import identify
from qmpblock.changes.leftovers import make_way
from qmpblock.changes.nodes import check_copy_on_read
from qmpblock.changes.operations import ActiveCommit, Commit, Stream
from qmpblock.errors import (
    UNTOUCHED,
    CommandError,
    GraphError,
    InUseError,
    UnsupportedError,
    printable,
)
from qmpblock.graph.jsonname import as_text
from qmpblock.graph.model import BlockGraph, DiskDevice, Layer, Node
from qmpblock.graph.opened import name_suffices, opened
from qmpblock.graph.places import Place, Places, known
from qmpblock.graph.sharedfiles import files_of
from qmpblock.host.filelocks import foreign_users
from qmpblock.host.imagefiles import home_of, image_files
from qmpblock.host.openfiles import OpenFiles
from qmpblock.host.processes import command_line
from qmpblock.host.renamed import name_now
from qmpblock.managers import Work
from qmpblock.names import (
    commit_job,
    helper_bitmap,
    lock_names,
    paused_node,
    pivot_job,
    stream_job,
)
from qmpblock.qemu import ownership
from qmpblock.qemu.threshold import is_watched

if TYPE_CHECKING:
    from qmpblock.mapping import MappedDisk
    from qmpblock.qemu.connection import Connection

__all__ = [
    "helper_of",
    "look",
    "opened_as",
    "record_of_commit",
    "record_of_stream",
    "unless_changed",
    "with_settings",
    "work_of",
]


@asynccontextmanager
async def unless_changed(vm: Connection, devices: Iterable[DiskDevice]) -> AsyncIterator[None]:
    """Have what QEMU refuses the body be that somebody has changed a chain, where that is why.

    :param devices: as they were planned for.
    :raise GraphError: a command was refused, and one has another chain.
    """
    try:
        yield
    except CommandError as error:
        graph = await vm.graph()
        for device in devices:
            try:
                check_chain(graph, device)
            except GraphError as changed:
                raise changed from error
        raise


async def look(disk: MappedDisk, make: Any, *, lent: bool = False) -> StreamPlan | CommitPlan:
    """Look at a disk, and plan, or refuse; only what a dead controller left is undone.

    :param make: returns the plan for a graph, a device in it, and the files of its nodes.
    :param lent: whether the manager that lends the monitor will do it itself.
    :raise Error: it cannot be done; nothing was touched.
    """
    await ownership.ask(disk.vm.monitor, [disk.device])
    await make_way(disk.vm, lock_names([disk.device]))
    graph = await disk.vm.graph()
    disk.device = graph.device(disk.device.qom_path)
    files = OpenFiles(disk.vm.monitor.peer_pid)
    places = files.places(graph.nodes.values())
    plan: StreamPlan | CommitPlan = make(graph, disk.device, places)
    if plan.leaving:
        _check_other_processes(plan, files, places)
    _check_copy_on_read(disk.vm, plan)
    if isinstance(plan, CommitPlan) and plan.pivots and plan.leaving:
        await check_held_io(
            disk.vm.monitor,
            plan.device,
            remedy="stream, which leaves the guest on its active image; or commit by qemu-img when "
            "the VM is off",
        )
        await check_frozen_ones(disk.vm.monitor, plan.base)
    if plan.leaving:
        await ownership.ask_for_change(disk.vm, work_of(disk, plan), graph, asked=lent)
    return _named(plan, files, places)


def _named(
    plan: StreamPlan | CommitPlan, files: OpenFiles, places: Places
) -> StreamPlan | CommitPlan:
    """Say of the layers that leave what they are called now, and warn where that is not known."""
    names = tuple(name_now(layer, files, places) for layer in plan.leaving)
    lost = tuple(
        f"@{layer.depth} {printable(layer.file)} is not the name any more of what the VM has open "
        "as that (it was renamed, replaced or removed since): what leaves the chain, and is not to "
        "be used again, is that file, whatever it is called now, and none that is at that name"
        for layer, name in zip(plan.leaving, names, strict=True)
        if name is None
    )
    return replace(plan, names=names, warnings=(*plan.warnings, *lost))


def work_of(disk: MappedDisk, plan: StreamPlan | CommitPlan) -> Work:
    """Say what is to be done, for a manager that does it by itself."""
    base = plan.base.file if plan.base is not None and plan.base.depth else ""
    lowest = plan.base is not None and plan.base.depth == len(disk.chain.layers) - 1
    active = disk.chain.active.file
    if isinstance(plan, StreamPlan):
        return Work("stream", active, plan.top.file if plan.top.depth else "", base)
    if plan.pivots:
        return Work("pivot", active, base="" if lowest else base)
    return Work("commit", active, plan.top.file, base)


def _check_other_processes(plan: StreamPlan | CommitPlan, files: OpenFiles, places: Places) -> None:
    """Refuse to write to an image that another process uses too: a second VM over one base.

    :raise InUseError: one does.
    """
    written = plan.base if isinstance(plan, CommitPlan) else plan.top
    if written.depth == 0:
        return  # the guest writes to it all the time
    for node in files_of(written):
        place = known(places, node)
        who = foreign_users(files, place.file) if place is not None else None
        if who is not None:
            raise InUseError(
                f"@{written.depth} {printable(written.file)} is open in {who} too, which writes "
                "to it or would see it change (a second VM over the same image?)",
                standing=UNTOUCHED,
                remedy="end that process, or give it an image of its own",
            )


def _check_copy_on_read(vm: Connection, plan: StreamPlan | CommitPlan) -> None:
    """Refuse to have QEMU copy on read where that would kill it."""
    if isinstance(plan, StreamPlan) and plan.leaving:
        check_copy_on_read(vm.capabilities, plan.top)
    elif plan.hidden:
        check_copy_on_read(vm.capabilities, plan.device.chain.active)


async def record_of_stream(disk: MappedDisk, plan: StreamPlan, run: str) -> Stream:
    """Return what the journal is to say of a stream."""
    return Stream(
        **await _common(disk, plan, run),
        job=stream_job(run),
        flush=plan.top.node.name,
        keeper=plan.top.node.name,
        top=plan.top.node.name,
        top_file=plan.top.file,
        base=plan.base.node.name if plan.base else "",
        base_file=plan.base.file if plan.base else "",
        backing_name=plan.backing_name or "",
        leaving=_nodes_of(plan.leaving),
        merges=tuple((merge.target, merge.source, merge.name) for merge in plan.merges),
    )


async def record_of_commit(disk: MappedDisk, plan: CommitPlan, run: str) -> Commit | ActiveCommit:
    """Return what the journal is to say of a commit."""
    said = {
        **await _common(disk, plan, run),
        "top": plan.top.node.name,
        "top_file": plan.top.file,
        "base": plan.base.node.name,
        "base_file": plan.base.file,
        "leaving": _nodes_of(plan.leaving),
        "bitmaps": tuple(
            (bitmap.node, name)
            for bitmap in plan.bitmaps
            for name in (
                [bitmap.name, helper_of(run, bitmap)] if bitmap.persistent else [bitmap.name]
            )
        ),
        "promotions": tuple(
            (bitmap.node, helper_of(run, bitmap), bitmap.name, bitmap.granularity)
            for bitmap in plan.bitmaps
            if bitmap.persistent
        ),
    }
    if plan.pivots:
        opened = await _how_to_start(disk.vm, plan.base)
        if await must_pause(disk.vm, plan.device, plan.base.format):
            said["nodes"] = (paused_node(run),)
        return ActiveCommit(**said, job=pivot_job(run), base_opened=opened)
    assert plan.above is not None  # a layer stays, and gets another backing image
    return Commit(
        **said,
        job=commit_job(run),
        flush=plan.base.node.name,
        keeper=plan.above.node.name,
        backing_name=plan.backing_name or "",
    )


async def with_settings(
    vm: Connection, plan: CommitPlan, record: ActiveCommit
) -> tuple[CommitPlan, ActiveCommit]:
    """Have the base get what the guest's disk is set to, and say what it will not have."""
    command, device = command_line(vm.monitor.peer_pid), plan.device
    lost = lost_by_commit(command, device, plan.base, watched=await is_watched(vm, device))
    now, there = plan.top.node.detect_zeroes, plan.base.node.detect_zeroes
    return replace(plan, warnings=(*plan.warnings, *lost)), replace(
        record,
        detect_zeroes="" if now == there else now,
        discard=discard_to_restore(command, device.chain, plan.base),
    )


async def _common(disk: MappedDisk, plan: StreamPlan | CommitPlan, run: str) -> dict[str, Any]:
    """Return what the record of either job says."""
    device = plan.device
    images = list(image_files(disk.vm.monitor.peer_pid, device.chain))
    for layer, name in zip(plan.leaving, plan.names, strict=True):
        if name not in (None, layer.file):
            images[layer.depth] = home_of(str(name))
    return {
        "run": run,
        "vm": await identify(disk.vm),
        "devices": (device.qom_path,),
        "names": (device.name,),
        "locks": lock_names([device]),
        "images": tuple(images),
    }


def _nodes_of(layers: tuple[Layer, ...]) -> tuple[tuple[str, str], ...]:
    """Return name and file name of every node of these layers, the format nodes first."""
    nodes = [(node.name, node.filename) for layer in layers for node in layer.nodes]
    return tuple(dict.fromkeys(nodes))


def helper_of(run: str, bitmap: NewBitmap) -> str:
    """Return the name of the transient bitmap that a persistent one begins as."""
    return helper_bitmap(run, bitmap.name)


async def _how_to_start(vm: Connection, base: Layer) -> str:
    """Return how a base is opened, where its name and format do not suffice; else nothing."""
    if name_suffices(base):
        return ""
    try:
        return as_text(await opened_as(vm, base))
    except UnsupportedError:
        return base.node.filename.removeprefix("json:")  # as good as QEMU itself can say it


async def opened_as(
    vm: Connection, layer: Layer, graph: BlockGraph | None = None
) -> dict[str, Any]:
    """Return the options that open a layer from outside as QEMU has it, with all below it.

    :param graph: as it has just been read, if it has.
    :raise UnsupportedError: nobody could open it so.
    """
    files = OpenFiles(vm.monitor.peer_pid)

    def path_of(node: Node) -> str | None:
        place = files.place(node)
        # What only the VM sees ends with it.
        seen = isinstance(place, Place) and not place.here.startswith("/proc/")
        return place.here if isinstance(place, Place) and seen else None

    return opened(graph or await vm.graph(), layer.node.name, path_of)
