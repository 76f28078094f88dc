"""Filling: zeros, as data, into an image that is frozen below an overlay, by QEMU itself.

The guest does not let anybody write to what its overlay T lies on, so it must lie on something
else for that time: on a view of the image D as it is now. A snapshot-access node over a
copy-before-write filter is such a view (QEMU's own way to a point in time, "fleecing"): what is
written to D goes through the filter, which keeps in K what was there before::

    guest -> T -> view -> filter -> joint -> D
                          |  |
             Z -> window -+  +-> K             view: snapshot-access; filter: copy-before-write

A commit job then copies Z into its backing, the window: those bytes of D from the first to the
last of the ranges. Z is a qcow2 image that holds data in the ranges, and its data file is null-co:
to write them takes no space and no time, and they are read as zeros.

Why not Z between T and D, and an ordinary commit of a middle layer? That job walks the whole
virtual disk in steps of 512 KiB, one at a time (10 s for 2 TiB); one whose top is nobody's
backing image (an active commit, a mirror inside) goes by Z's own map, 16 requests at a time.

Nothing here is needed after a crash: T's header names D, and what Z brings changes no content.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from qmpblock.chains.headers import Header, make
from qmpblock.chains.overlay import Item, make_file, make_overlay
from qmpblock.changes.nodes import lay, set_detect_zeroes, set_writable
from qmpblock.errors import JobError
from qmpblock.host.qemuio import QemuIo, null_data
from qmpblock.names import (
    create_job,
    filling_job,
    filling_nodes,
    joint_node,
    joint_nodes,
    kept_file,
    zeros_file,
)
from qmpblock.qemu.job import Job
from qmpblock.qemu.joint import Joint

if TYPE_CHECKING:
    from qmpblock.changes.change import Change
    from qmpblock.changes.operations import StagedCommit
    from qmpblock.graph.model import Layer
    from qmpblock.qemu.connection import Connection
    from qmpblock.ranges import Ranges

__all__ = ["SPAN", "Parts", "fill"]

SPAN = 1 << 40
"""Bytes from the first to the last range, at most: so that Z's metadata stays small."""

_FILTER_UNIT = 64 << 10  # bytes that copy-before-write keeps at once, at least
_LARGEST_CLUSTER = 2 << 20  # bytes, of a qcow2 image; QED knows larger ones


@dataclass(frozen=True)
class Parts:
    """What all that a filling adds to QEMU, and to the image's directory, is called."""

    run: str
    overlay: str

    @property
    def nodes(self) -> tuple[str, ...]:
        """The nodes, each before those that it lies on."""
        return *filling_nodes(self.run), *joint_nodes(self.joint)

    @property
    def joint(self) -> str:
        """The joint by which all of them lie on the image."""
        return joint_node(self.run)

    @property
    def zeros(self) -> str:
        """The file of Z."""
        return zeros_file(self.overlay)

    @property
    def kept(self) -> str:
        """The file of K."""
        return kept_file(self.overlay)

    @property
    def files(self) -> tuple[str, str]:
        """Both files."""
        return self.zeros, self.kept

    @property
    def job(self) -> str:
        """The commit job."""
        return filling_job(self.run)

    @property
    def making(self) -> str:
        """The job that makes K's header, where QEMU has to."""
        return create_job(self.run, 1)


async def fill(
    vm: Connection,
    change: Change[StagedCommit],
    item: Item,
    frozen: Layer,
    chosen: Ranges,
    tell: Callable[[int], None],
) -> None:
    """Store zeros as data in ranges of a frozen image in which there is nothing, or zeros.

    It is left as it is found: T lies on D again, and what was added is gone. Failed or
    cancelled, that is for the change's undoing to do.

    :param item: the overlay T, which lies on the frozen image.
    :param chosen: whole clusters, at most SPAN from the first to the last.
    :param tell: is called with the bytes that are stored.
    :raise JobError: QEMU's job failed: there is no room, say.
    """
    record, execute = change.record, vm.monitor.execute
    parts = Parts(record.run, record.top_file)
    z, window, view, filter_, kept, *_ = parts.nodes
    joint = Joint(vm.monitor, parts.joint)
    first, stop = int(chosen.starts[0]), int(chosen.stops[-1])
    await _make_zeros(vm, change, item, frozen, chosen)
    await _make_kept(vm, change, item, frozen)
    await joint.add(frozen.size)
    await set_writable(vm, record.base)
    if record.detect_zeroes:
        # It would make zero clusters of the zeros, which take no space. What the guest writes
        # goes through the overlay, which detects zeros as the image did.
        await set_detect_zeroes(vm, record.base, "off")
    for node in (
        {"driver": "copy-before-write", "node-name": filter_, "file": parts.joint, "target": kept},
        {"driver": "snapshot-access", "node-name": view, "file": filter_},
        {
            "driver": "raw",
            "node-name": window,
            "file": filter_,
            "offset": first,
            "size": stop - first,
        },
        {
            **_scratch(z, parts.zeros),
            "data-file": null_data(stop - first),
            "backing": window,
        },
    ):
        await execute("blockdev-add", node)
    await joint.put_on(record.base, item.plan.device)
    await lay(vm, item.node, view, lambda: item.node_options(view))
    job = Job(vm.monitor, parts.job, "commit")
    try:
        # Never waited for if there is no room: the overlay is to come home, and grows meanwhile.
        await job.start(
            "block-commit",
            {"device": z, "top-node": z, "base-node": window, "on-error": "report"},
        )
        await _copied(vm, job, tell)
    finally:
        job.end()
    await lay(vm, item.node, record.base, lambda: item.node_options(record.base))
    for name in (z, window, view, filter_, kept):
        await execute("blockdev-del", {"node-name": name})
    await joint.remove()


async def _make_zeros(
    vm: Connection, change: Change[StagedCommit], item: Item, frozen: Layer, chosen: Ranges
) -> None:
    parts = Parts(change.record.run, change.record.top_file)
    first, size = int(chosen.starts[0]), int(chosen.stops[-1] - chosen.starts[0])
    header = Header("qcow2", size, cluster=_cluster(frozen), data_elsewhere=True)
    marked = ((start - first, end - first) for start, end in chosen)
    zeros = await QemuIo(stall=vm.stall).mark_as_data(await make(vm, header), size, marked)
    make_file(change, replace(item, file=parts.zeros), zeros)


async def _make_kept(
    vm: Connection, change: Change[StagedCommit], item: Item, frozen: Layer
) -> None:
    """Make K; an encrypted one where data of an encrypted image may come into it.

    That is so where the filter's unit is larger than the image's clusters: it keeps what lies
    beside the ranges, too.
    """
    parts = Parts(change.record.run, change.record.top_file)
    kept, storage = parts.nodes[4:6]
    if frozen.node.encrypted and _cluster(frozen) < _FILTER_UNIT:
        mine = replace(
            item,
            file=parts.kept,
            node=kept,
            storage=storage,
            job=parts.making,
            cluster=_FILTER_UNIT,
        )
        await make_overlay(vm, change, mine, "qcow2", local=True)
        return
    header = Header("qcow2", frozen.size, cluster=max(_FILTER_UNIT, _cluster(frozen)))
    make_file(change, replace(item, file=parts.kept), await make(vm, header))
    await vm.monitor.execute("blockdev-add", _scratch(kept, parts.kept) | {"backing": None})


def _scratch(node: str, file: str) -> dict[str, Any]:
    """Return the options of an image that nobody will miss after a crash."""
    return {
        "driver": "qcow2",
        "node-name": node,
        "file": {"driver": "file", "filename": file},
        "cache": {"no-flush": True},
    }


def _cluster(frozen: Layer) -> int:
    return min(frozen.node.cluster_size or _FILTER_UNIT, _LARGEST_CLUSTER)


async def _copied(vm: Connection, job: Job, tell: Callable[[int], None]) -> None:
    """Follow the job until all is copied and flushed, which is when it is ready, and end it.

    Completed, it would have whoever uses Z go on in the window; there is nobody.

    :raise JobError: it failed, or somebody cancelled it.
    """
    ready, error = False, None
    async for seen in job.follow(converging=vm.stall):
        tell(seen.done)
        error = seen.error
        if seen.ready and not ready:
            ready = True
            await job.cancel()
    await job.dismiss()
    if not ready:
        raise JobError(job.id, "commit", error or "it ended before all was copied")
