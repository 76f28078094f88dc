"""Stream and commit: the jobs that move data between the layers of a running disk.

Both are one `Change` around one QEMU job that waits for us before its end::

    created -> running -> pending -> concluded           stream, commit of middle layers
                             flush, finalize

    created -> running -> ready -> pending -> concluded  commit of the active layer
                          complete   mark, finalize

- A stream must not drop the link to a backing image before what it copied is on stable
  storage (K6). While it is pending the guest's I/O flows, so there is time to flush.
- An active commit holds the guest's I/O while it is pending (K5), and then, and only then,
  both images hold everything. Two fsyncs, side by side, say in the journal and in its copy that
  from here on the base is the one to trust; then the job pivots.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qmpblock.cancellation import undisturbed
from qmpblock.chains.look import (
    helper_of,
    look,
    record_of_commit,
    record_of_stream,
    unless_changed,
    with_settings,
)
from qmpblock.chains.plan import (
    CommitPlan,
    Hidden,
    StreamPlan,
    check_unchanged,
    plan_commit,
    plan_stream,
)
from qmpblock.chains.readonly import refusal
from qmpblock.changes.backingproof import check_record
from qmpblock.changes.change import Change
from qmpblock.changes.finalize import drive, flush
from qmpblock.changes.operations import ActiveCommit, Commit, Stream
from qmpblock.changes.record import Record
from qmpblock.changes.settle import device_of, settle
from qmpblock.changes.step import Choice
from qmpblock.changes.throttle import io_limits
from qmpblock.errors import (
    CommandError,
    Error,
    GraphError,
    JobError,
    RequestError,
    UnsupportedError,
    printable,
)
from qmpblock.host.openfiles import sees_directory
from qmpblock.host.processes import command_line
from qmpblock.mapping import check_active, exported_active
from qmpblock.names import new_run
from qmpblock.qemu import ownership
from qmpblock.qemu.feed import working
from qmpblock.qemu.job import Job, Progress

if TYPE_CHECKING:
    from qmpblock.mapping import MappedDisk
    from qmpblock.qemu.connection import Connection

__all__ = ["ChainJob", "Outcome", "carry_on", "changed", "commit", "make_explicit", "stream"]

_ATTEMPTS = 4  # at making hidden zeros explicit while the guest discards


@dataclass(frozen=True)
class Outcome:
    """What a stream or commit did.

    :ivar operation: `stream` or `commit`.
    :ivar disk: what people call it.
    :ivar changed: False where there was nothing to do.
    :ivar active: the file of the active layer afterwards.
    :ivar left: files of the images that left the chain, and are closed now.
    :ivar nameless: those of `left` that were not under that name any more: what is there now, if
        anything is, is another file.
    :ivar made_explicit: bytes that read as zeros only because of a short layer, and are
        explicit zeros in the active layer now.
    :ivar pivoted: whether the active layer is another one.
    :ivar opened: after a pivot the options that open it (as blockdev-add takes them, in JSON),
        where its file name and format do not suffice; else empty.
    :ivar warnings: what is worth acting on.
    """

    operation: str
    disk: str
    changed: bool
    active: str
    left: tuple[str, ...] = ()
    made_explicit: int = 0
    pivoted: bool = False
    seconds: float = 0.0
    warnings: tuple[str, ...] = ()
    opened: str = ""
    nameless: tuple[str, ...] = ()


class ChainJob(Job):
    """The job of a stream or commit.

    :ivar warnings: known before it started: dirty bitmaps that end with their layer.
    :ivar outcome: what it did; None before the `async with` that yielded it has ended.
    """

    def __init__(self, vm: Connection, id: str, type: str) -> None:  # noqa: A002 - QMP's words
        super().__init__(vm.monitor, id, type)
        self.warnings: tuple[str, ...] = ()
        self.outcome: Outcome | None = None


@asynccontextmanager
async def stream(
    disk: MappedDisk, *, top: str | None = None, base: str | None = None, speed: int = 0
) -> AsyncIterator[ChainJob]:
    """Copy what the layers between `top` and `base` hold into `top`, and drop them.

    See `Disk.stream`.
    """
    async with disk.vm.unless_gone():
        plan = await look(disk, lambda *seen: plan_stream(seen[0], seen[1], top, base, seen[2]))
    assert isinstance(plan, StreamPlan)
    run = new_run()
    record = await record_of_stream(disk, plan, run)
    arguments: dict[str, Any] = {"device": plan.top.node.name, "speed": speed}
    if plan.base is not None:
        arguments |= {"base-node": plan.base.node.name, "backing-file": plan.backing_name}
    async with _running(disk, plan, record, "block-stream", arguments) as job:
        yield job


@asynccontextmanager
async def commit(
    disk: MappedDisk,
    *,
    top: str | None = None,
    base: str | None = None,
    speed: int = 0,
    throttle_guest: int = 0,
) -> AsyncIterator[ChainJob]:
    """Copy what `top` and the layers above `base` hold into `base`, and drop them.

    See `Disk.commit`.
    """
    async with disk.vm.unless_gone():
        plan = await look(disk, lambda *seen: plan_commit(seen[0], seen[1], top, base, seen[2]))
    assert isinstance(plan, CommitPlan)
    run = new_run()
    root = plan.device.chain.root.name
    record: Commit | ActiveCommit = await record_of_commit(disk, plan, run)
    if isinstance(record, ActiveCommit) and plan.leaving:
        plan, record = await with_settings(disk.vm, plan, record)
        if throttle_guest:
            limits, group = await io_limits(disk.vm, plan.device)
            record = replace(record, throttle=tuple(limits.items()), throttle_group=group)
    arguments: dict[str, Any] = {
        "device": root,
        "top-node": plan.top.node.name,
        "base-node": plan.base.node.name,
        "speed": speed,
    }
    if plan.backing_name is not None:
        arguments["backing-file"] = plan.backing_name
    async with _running(
        disk, plan, record, "block-commit", arguments, throttle_guest=throttle_guest
    ) as job:
        yield job


@asynccontextmanager
async def _running(
    disk: MappedDisk,
    plan: StreamPlan | CommitPlan,
    record: Stream | Commit | ActiveCommit,
    command: str,
    arguments: dict[str, Any],
    *,
    throttle_guest: int = 0,
) -> AsyncIterator[ChainJob]:
    started = time.monotonic()
    vm = disk.vm
    job = ChainJob(vm, record.job, record.operation)
    job.warnings = plan.warnings
    if not plan.leaving:
        job.end()
        job.outcome = Outcome(record.operation, disk.name, False, disk.chain.active.file)
        yield job
        return
    if arguments["speed"] < 0:
        raise RequestError(f"a speed of {arguments['speed']} bytes a second is none")
    beside = None
    if isinstance(record, ActiveCommit):
        # By its path here, if it is here: then that is where its journal lies, too.
        record = replace(record, top_file=record.images[plan.top.depth])
        record = replace(record, base_file=record.images[plan.base.depth if plan.base else 0])
        local = Path(record.top_file)
        elsewhere = sees_directory(vm.monitor.peer_pid, str(local.parent))
        beside = local if elsewhere is None and local.exists() else None
    change = Change(vm, record, beside=beside)
    await change.begin()
    try:
        async with _or_undo(change):
            explicit = await _prepare(disk, plan, record)
            await ownership.ask(vm.monitor, [plan.device], standing=None)
            try:
                async with unless_changed(vm, [plan.device]):
                    await job.start(command, {**arguments, "on-error": job.on_error("enospc")})
            except CommandError as error:
                raise _refusal(disk.vm, plan, error) from None
            if record.pivot and plan.device.chain.filters:
                # Below one QEMU takes as a middle layer what is not the active one by now (K46).
                await disk.refresh()
                check_active(disk, plan.top)
            driving = drive(
                vm,
                record,
                change.journal,
                job,
                plan.device,
                throttle_guest=throttle_guest,
                held=change.held,
            )
            async with working(driving, job):
                yield job
                job.complete()
            missing = await undisturbed(_finish(change, disk, plan))
    finally:
        job.end()
    job.outcome = replace(
        changed(record.operation, disk, plan),
        # What it was when looked up last: the disk may have been unplugged.
        active=plan.base.file if record.pivot and plan.base else disk.chain.active.file,
        made_explicit=explicit,
        pivoted=record.pivot,
        seconds=time.monotonic() - started,
        warnings=(*plan.warnings, *missing),
        opened=record.base_opened if isinstance(record, ActiveCommit) else "",
    )


def changed(operation: str, disk: MappedDisk, plan: StreamPlan | CommitPlan) -> Outcome:
    """Return what a stream or commit that was done has done, as far as its plan tells that."""
    named = list(zip(plan.leaving, plan.names, strict=True))
    return Outcome(
        operation,
        disk.name,
        True,
        disk.chain.active.file,
        left=tuple(layer.file if name is None else name for layer, name in named),
        warnings=plan.warnings,
        nameless=tuple(layer.file for layer, name in named if name is None),
    )


async def _prepare(disk: MappedDisk, plan: StreamPlan | CommitPlan, record: Record) -> int:
    """Do what must come before the job; return the bytes that were made explicit."""
    await _unchanged(disk, plan, record)
    if record.flush:
        # What will be needed at the end, after hours perhaps: rather be refused now.
        await flush(disk.vm, plan.device, record.flush)
    explicit = await make_explicit(disk, plan.hidden) if plan.hidden else 0
    for bitmap in plan.bitmaps if isinstance(plan, CommitPlan) else ():
        await disk.vm.monitor.execute(
            "block-dirty-bitmap-add",
            {
                "node": bitmap.node,
                "name": helper_of(record.run, bitmap) if bitmap.persistent else bitmap.name,
                "granularity": bitmap.granularity,
            },
        )
    return explicit


async def _unchanged(disk: MappedDisk, plan: StreamPlan | CommitPlan, record: Record) -> None:
    """Look again, now that no controller of ours can change the disk."""
    graph = await disk.vm.graph()
    check_unchanged(graph, plan.device)
    check_record(record, graph, disk.vm.monitor.peer_pid)


def _refusal(vm: Connection, plan: StreamPlan | CommitPlan, error: CommandError) -> Error:
    """Say in our words why QEMU did not start a job."""
    written = plan.top if isinstance(plan, StreamPlan) else plan.base
    return refusal(error, written, command_line(vm.monitor.peer_pid))


async def make_explicit(disk: MappedDisk, hidden: tuple[Hidden, ...]) -> int:
    """Make what short layers hide explicit zeros in the active layer; return the bytes.

    By NBD_CMD_CACHE of exactly those ranges (K20), and a look at what came of it. The disk is as it
    was seen when this was planned.

    :raise GraphError: the active layer is another one: of what is hidden the depth is, too.
    """
    from qmpblock.ranges import Ranges

    total, active = 0, disk.chain.active
    for _ in range(_ATTEMPTS):
        seen = await disk.map()
        check_active(disk, active)
        wanted = Ranges()
        for one in hidden:
            # Past its end a short layer shows as not held, one layer up (design.md, map).
            zeros = seen.where(depth=one.depth - 1, present=False)
            wanted = wanted | (zeros & Ranges([(one.start, one.stop)]))
        if not wanted:
            return total
        async with exported_active(disk) as client:
            whole = wanted.align_out(client.block_size.minimum, client.size)
            for start, stop in whole.split(client.max_cache_length):
                await client.cache(start, stop - start)
        total += wanted.total
    raise UnsupportedError(
        f"what {printable(disk.chain.layers[hidden[0].depth].file)} hides by being short could "
        "not be made explicit in the active layer: "
        f"{active.format} does not take it, or the guest discards it again and again",
        standing="the chain is as it was",
    )


async def _finish(
    change: Change[Record], disk: MappedDisk, plan: StreamPlan | CommitPlan
) -> tuple[str, ...]:
    """Remove what the job left, see that the chain is what it should be, and end.

    Returns warnings: what the disk could not be given back.
    """
    record = change.record
    graph = await settle(disk.vm, record, change.journal, Choice.CONTINUE)
    await change.end()
    if not any(device.qom_path == record.devices[0] for device in graph.devices):
        return ()  # unplugged; the images are as the journal's end says
    disk.device = graph.device(record.devices[0])
    names = {layer.node.name for layer in disk.chain.layers}
    left = [layer for layer in plan.leaving if layer.node.name in names]
    if not record.took_effect(graph) or left:
        raise GraphError(
            f"QEMU reports success, but the chain of {disk.name} is not what it should be: "
            f"{', '.join(printable(layer.file) for layer in disk.chain.layers)}",
            remedy="somebody else changed it at the same time; look at it: qmpblock disks ADDRESS",
        )
    now = disk.chain.active.node.detect_zeroes
    wanted = record.detect_zeroes if isinstance(record, ActiveCommit) else ""
    if wanted not in ("", now):
        return (f"detect-zeroes of {disk.name} is {now} now: QEMU does not set it to {wanted}",)
    return ()


def _or_undo(change: Change[Record]) -> AbstractAsyncContextManager[None]:
    return change.or_undo(
        lambda: "the chain is as it was; nothing of ours is left in the VM",
        done=lambda: (
            "it was done all the same: the guest had moved on already; nothing of ours is left"
        ),
    )


async def carry_on(
    vm: Connection,
    change: Change[Record],
    progress: Callable[[Progress], None] | None = None,
) -> Progress | None:
    """Carry a dead controller's stream or commit on to its end; the change is ended then.

    :param progress: is told what is seen of the job.
    :return: how the job was last seen; None where its end had come already.
    :raise JobError: QEMU's verdict is a failure; the change was undone.
    """
    record = change.record
    graph = await vm.graph()
    job = ChainJob(vm, record.job, record.operation)
    try:
        async with _or_undo(change):
            known = graph.job(record.job)
            if known is not None and known.status != "concluded":
                job.complete()
                device = device_of(record, graph)
                await drive(
                    vm, record, change.journal, job, device, held=change.held, progress=progress
                )
            elif known is not None and known.error is not None:
                raise JobError(job.id, job.type, known.error)
            await undisturbed(settle(vm, record, change.journal, Choice.CONTINUE))
            await change.end()
    finally:
        job.end()
    return job.progress
