"""One copy of one disk or several, from its plan to its last trace.

::

    plan        what goes where, or a refusal: nothing is touched before
    begin       locks, no migration; a journal where the guest goes over (`Move`)
    targets     made, marked, opened by QEMU
    mirrors     copy, and come to one instant (`qmpblock.copying.mirrors`)
    proof       closed targets, against the point that they are of (`qmpblock.copying.proof`)
    settle      jobs and nodes go; where the guest went over, its old images are closed
    finish      targets on stable storage, under their names
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, Unpack

from qmpblock.cancellation import undisturbed
from qmpblock.chains.heldio import must_pause
from qmpblock.chains.owner import is_asked
from qmpblock.changes.change import Change
from qmpblock.changes.copies import Copy, Move
from qmpblock.changes.finalize import keep_exports_away, until_unused
from qmpblock.changes.identity import identify
from qmpblock.changes.operations import PointInTime
from qmpblock.changes.record import PIVOTED, WORTH
from qmpblock.copying.backups import Backups
from qmpblock.copying.fleecing import Fleece, planned, take
from qmpblock.copying.fleecing import Plan as FleecingPlan
from qmpblock.copying.frame import (
    done,
    finish,
    finish_all,
    names_of,
    note_made,
    remove_marked,
    unchanged,
    undone,
    whole,
)
from qmpblock.copying.frozen import FrozenBackups, frozen
from qmpblock.copying.job import CopyJob, CopyResult, DiskCopy
from qmpblock.copying.latency import Pacer
from qmpblock.copying.look import backing_name, freezes_layers, look
from qmpblock.copying.managed import Moving, record_of
from qmpblock.copying.mirrors import Mirrors
from qmpblock.copying.options import CopyOptions, CopyWords
from qmpblock.copying.pacing import paced
from qmpblock.copying.proof import check_provable, check_served, work
from qmpblock.copying.reservation import prepare
from qmpblock.copying.resuming import give_up, note_kept, say_kept
from qmpblock.copying.storing import storing
from qmpblock.copying.targetfile import TargetFile
from qmpblock.copying.targets import check_servers, target_of
from qmpblock.copying.wire import credentials_in
from qmpblock.copying.wiretarget import bounded, cut_on_error
from qmpblock.errors import (
    DisconnectedError,
    Error,
    JobError,
    NotFoundError,
    RequestError,
)
from qmpblock.host.imagefiles import images_of
from qmpblock.host.openfiles import sees_directory
from qmpblock.names import (
    copy_job,
    lock_names,
    new_run,
    paused_node,
    target_node,
    written_bitmaps,
)
from qmpblock.qemu import ownership
from qmpblock.qemu.feed import working
from qmpblock.qemu.instant import instant

if TYPE_CHECKING:
    from qmpblock.copying.copytarget import CopyTarget
    from qmpblock.copying.plan import Since
    from qmpblock.mapping import MappedDisk
    from qmpblock.qemu.connection import Connection

__all__ = ["copy"]

DiskT = TypeVar("DiskT", bound="MappedDisk")


@asynccontextmanager
async def copy(
    vm: Connection,
    targets: Mapping[DiskT, str | os.PathLike[str]],
    *,
    since: Mapping[DiskT, Since] | None = None,
    kept: bool = True,
    **words: Unpack[CopyWords],
) -> AsyncIterator[CopyJob]:
    """Copy running disks. See `VM.copy`.

    :param since: of those of which the copy is to be an increment: of what. Of the start only.
    :param kept: whether what there is of a copy that fails is kept, to be gone on from.
    """
    started = time.monotonic()
    options = CopyOptions(**words)
    at, force, verify = options.point, options.force, options.verify
    credentials = None if options.tls_creds is None else credentials_in(options.tls_creds)
    if not targets:
        raise RequestError("a copy of no disk is none")
    async with vm.unless_gone():
        plans = await look(vm, targets, options)
    increments = since or {}
    plans = [
        replace(plan, since=increments.get(disk), kept=kept)
        for disk, plan in zip(targets, plans, strict=True)
    ]
    check_servers(vm, plans, credentials)
    if verify:
        await check_provable(vm, plans, at)
    elif options.resume:
        await check_served(vm, plans)
    run = new_run()
    pacer = Pacer(options.latency, options.speed) if options.latency else None
    job = CopyJob(tuple(warning for plan in plans for warning in plan.warnings), pacer)
    job.speed = options.speed
    with contextlib.ExitStack() as stack:
        files: list[CopyTarget] = []
        pivots = at == "pivot"
        async with vm.unless_gone():
            for number, plan in enumerate(plans):
                node = target_node(run, number)
                name = backing_name(vm, plan)
                how = {"force": force, "pivots": pivots, "resume": options.resume}
                made = target_of(vm, plan, node, number, name, credentials, **how)
                files.append(stack.enter_context(made))
            await prepare(targets, files)
        try:
            running: AbstractAsyncContextManager[Mirrors | Moving | Backups]
            if freezes_layers(vm, options):
                running = _of_layers(vm, files, job, verify=verify)
            elif at == "start":
                views = list(targets), Fleece(options.fleece, options.fleece_limit)
                running = _of_views(vm, *views, files, job, verify=verify)
            elif pivots and is_asked(vm):
                running = _by_manager(vm, run, list(targets), files, job)
            else:
                pauses = pivots and await _must_pause(vm, files)
                record = await _record(vm, run, files, pivot=pivots, pauses=pauses)
                running = _of_disks(vm, record, files, job, pauses=pauses)
            async with running as jobs:
                yield job
        except BaseException as error:
            if pivots:
                note_kept(files, job)
            gone = isinstance(error, DisconnectedError)
            if isinstance(error, Error) and not (pivots and gone):  # its journal has said so
                say_kept(error, job)
            if isinstance(error, DisconnectedError) and job.whole and not pivots:
                error.standing = f"{error.standing}; {whole(files)}"
            raise
        finally:
            job.end()
    job.result = CopyResult(
        at,
        tuple(_copied(file, jobs) for file in files),
        time.monotonic() - started,
        jobs.held,
        jobs.attempts,
        (
            *job.warnings,
            *(one for file in files if isinstance(file, TargetFile) for one in file.warnings),
        ),
        verify,
        None if pacer is None else pacer.outcome,
    )
    await _look_again(targets, files, pivots=at == "pivot")


async def _look_again(disks: Iterable[DiskT], files: Sequence[CopyTarget], *, pivots: bool) -> None:
    """Have the disks see their chains.

    :raise DisconnectedError: the connection is lost; the copies are whole.
    """
    try:
        for disk in disks:
            with contextlib.suppress(NotFoundError):  # unplugged
                await disk.refresh()
    except DisconnectedError as error:
        # The change has ended: only words are left.
        error.standing = whole(files)
        if pivots:
            error.standing = (
                f"the guest had gone over. If QEMU has ended, start the VM from {names_of(files)}: "
                "there the guest went on"
            )
        raise


def _copied(file: CopyTarget, jobs: Mirrors | Moving | Backups) -> DiskCopy:
    plan = file.plan
    source = plan.device.chain.active.file
    left, shape = file.left, plan.shape
    done = jobs.last[plan.device.name].done + (0 if left is None else left.copied)
    return DiskCopy(
        plan.device.name,
        source,
        plan.file,
        plan.format,
        plan.size,
        done,
        compared=None if left is None else left.compared,
        missing=None if left is None else left.missing,
        allocation=shape.allocation,
        compressed=shape.compress,
    )


async def _must_pause(vm: Connection, files: Sequence[CopyTarget]) -> bool:
    """Whether the VM has to be paused for the guest to go over to its copies."""
    plans = [file.plan for file in files]
    return any([await must_pause(vm, plan.device, plan.format) for plan in plans])


async def _record(
    vm: Connection, run: str, files: Sequence[CopyTarget], *, pivot: bool, pauses: bool
) -> Copy:
    """Return what the locks, and a journal, are to say."""
    plans = [file.plan for file in files]
    devices = [plan.device for plan in plans]
    common: dict[str, Any] = {
        "run": run,
        "vm": await identify(vm),
        "devices": tuple(device.qom_path for device in devices),
        "names": tuple(device.name for device in devices),
        "locks": lock_names(devices),
        "helpers": tuple(copy_job(run, number) for number, _ in enumerate(plans)),
        "nodes": tuple(name for file in files for name in file.nodes),
        "wires": tuple(wire for file in files for wire in file.wires),
        "images": images_of(vm.monitor.peer_pid, [device.chain for device in devices]),
        "noted": tuple(
            (file.plan.device.chain.active.node.name, name)
            for file in files
            if file.resumed
            for name in written_bitmaps(file.node)
        ),
    }
    if pauses or common["noted"]:
        common["nodes"] += (paused_node(run),)
    if not pivot:
        return Copy(**common)
    left = [node for plan in plans for layer in plan.layers for node in layer.nodes]
    return Move(
        **common,
        files=tuple(plan.file for plan in plans),
        sources=tuple(device.chain.active.node.name for device in devices),
        targets=tuple(file.node for file in files),
        settings=tuple(
            one for file in files if isinstance(file, TargetFile) for one in file.given_back(vm)
        ),
        leaving=tuple(dict.fromkeys((node.name, node.filename) for node in left)),
    )


@asynccontextmanager
async def _of_disks(
    vm: Connection, record: Copy, files: Sequence[CopyTarget], job: CopyJob, *, pauses: bool
) -> AsyncIterator[Mirrors]:
    """Copy while the body runs, and come to the end on leaving it; or leave all as it was.

    :param pauses: whether the VM is paused where the guest goes over.
    """
    pivots = isinstance(record, Move)
    change = Change(vm, record, beside=_beside(vm, record), journaled=pivots)
    going = [file.plan.device.chain.active.node.name for file in files]

    @asynccontextmanager
    async def quiet() -> AsyncIterator[bool]:
        async with AsyncExitStack() as alone:
            alone.enter_context(bounded(files))
            await keep_exports_away(vm, going, alone)
            if pivots:
                await until_unused(vm, record)
                for file in files:
                    if isinstance(file, TargetFile):
                        file.check_place()  # or the guest would go over to what has no name
            if pauses:
                await alone.enter_async_context(instant(vm, paused_node(record.run)))
            alone.enter_context(vm.monitor.in_one_turn())  # the guest is about to be held
            yield pauses

    async def mark(*, over: bool) -> None:
        if change.journal is not None:
            change.journal.mark(**{PIVOTED: over})

    async def note(file: CopyTarget) -> None:
        journal = change.journal
        if pivots and journal is not None and file.keeps and file.path not in journal.kept():
            journal.add(**{"file": file.path, WORTH: True})

    mirrors = Mirrors(vm, record.run, files, job, pivots, mark, quiet, note)
    await change.begin()
    mirrors.migrates_not = change.held
    async with change.or_undo(lambda: undone(files, job, mirrors.over), lambda: done(files)):
        try:
            async with cut_on_error(vm, record.helpers, files):
                await unchanged(vm, files)
                for file in files:
                    await file.make(vm, partial(note_made, change, file))
                    await file.open(vm)
                devices = [file.plan.device for file in files]
                await ownership.ask(vm.monitor, devices, standing=None)
                async with storing(files), working(paced(vm, job, files, mirrors.work), job):
                    yield mirrors
                    job.completion.set()
                await undisturbed(finish(change, files, job))
        except BaseException:
            await undisturbed(remove_marked(change, files, job))
            raise


@asynccontextmanager
async def _by_manager(
    vm: Connection,
    run: str,
    disks: Sequence[MappedDisk],
    files: Sequence[CopyTarget],
    job: CopyJob,
) -> AsyncIterator[Moving]:
    """Have the manager copy while the body runs, and the guest go over on leaving it; or undo."""
    change = Change(vm, await record_of(vm, run, files))
    moving = Moving(change, disks, files, job)
    await change.begin()
    async with change.or_undo(lambda: undone(files, job, moving.over), lambda: done(files)):
        await unchanged(vm, files)
        for file in files:
            assert isinstance(file, TargetFile)  # a copy with a pivot makes files
            file.managed = True
            await file.make(vm, partial(note_made, change, file))
        await ownership.ask(vm.monitor, [file.plan.device for file in files], standing=None)
        async with storing(files), working(paced(vm, job, files, moving.work), job):
            yield moving
            job.completion.set()
        await undisturbed(finish(change, files, job))


@asynccontextmanager
async def _of_views(
    vm: Connection,
    disks: Sequence[MappedDisk],
    fleece: Fleece,
    files: Sequence[CopyTarget],
    job: CopyJob,
    *,
    verify: bool,
) -> AsyncIterator[Backups]:
    """Copy disks as they are when this is entered, from views of that instant.

    Their jobs hold nobody: the guest writes elsewhere.

    :param verify: whether the copies are compared with the views before these are given up.
    """
    try:
        for file in files:
            await file.make(vm, lambda _: None)
        async with planned(vm, disks, fleece, looked=True) as plan:
            change = Change(vm, await _record_of_views(vm, plan, files))
            await change.begin()
            backups = Backups(vm, change.record.helpers, files, job, stays=change.held)
            async with (
                change.or_undo(lambda: undone(files, job)),
                cut_on_error(vm, change.record.helpers, files),
            ):
                for file, item in zip(files, plan.items, strict=True):
                    file.source = item.nodes[0]  # the view that is going to be
                    await file.open(vm)  # or fail, before the guest's disk is touched
                with bounded(files):
                    await take(vm, change, plan)
                proving = partial(work, backups, proven=verify)
                try:
                    async with storing(files), working(paced(vm, job, files, proving), job):
                        yield backups
                except JobError as error:
                    if (full := plan.without_room()) is not None:
                        error.remedy = (
                            f"{full}: give it more, by --fleece and --fleece-limit, or copy when "
                            "the guest writes less"
                        )
                    elif (changed := plan.changed_in(await vm.graph())) is not None:
                        error.remedy = f"{changed}: have it done, then run this again"
                    raise
                await undisturbed(finish(change, files, job))
    except BaseException:
        await undisturbed(give_up(files, job))
        raise


@asynccontextmanager
async def _of_layers(
    vm: Connection, files: Sequence[CopyTarget], job: CopyJob, *, verify: bool
) -> AsyncIterator[Backups]:
    """Copy disks as they are when this is entered, while the guest's writes go to overlays."""

    async def prepare() -> None:
        await unchanged(vm, files)
        for file in files:
            await file.make(vm, lambda _: None)
            await file.open(vm)

    try:
        async with frozen(vm, files, prepare) as layers:
            backups = FrozenBackups(vm, layers.jobs, files, job, frozen=layers.disks)
            backups.stays = layers.held_here
            proving = partial(work, backups, proven=verify)
            async with storing(files), working(paced(vm, job, files, proving), job):
                yield backups
        backups.held = layers.held_guest
        try:
            await undisturbed(finish_all(vm, files, job))
        except Error as error:
            error.standing = error.standing or undone(files, job)
            raise
    except BaseException:
        await undisturbed(give_up(files, job))
        raise


async def _record_of_views(
    vm: Connection, plan: FleecingPlan, files: Sequence[CopyTarget]
) -> PointInTime:
    """Return what the locks and the journal are to say, and name the targets' nodes for it."""
    for number, (file, item) in enumerate(zip(files, plan.items, strict=True)):
        file.node = target_node(plan.run, number)
        if file.plan.asks:
            file.told_by = item.device.chain.active.node.name, item.nodes[2]
    said = await plan.record_fields(vm)
    nodes = [name for file in files for name in file.nodes]
    wires = tuple(wire for file in files for wire in file.wires)
    jobs = tuple(copy_job(plan.run, number) for number, _ in enumerate(files))
    return PointInTime(
        **said | {"helpers": jobs, "nodes": (*nodes, *said["nodes"]), "wires": wires}
    )


def _beside(vm: Connection, record: Copy) -> Path | None:
    """Return the image beside which the journal is kept, too, where it is here."""
    if not record.home:
        return None
    local = Path(record.home)
    elsewhere = sees_directory(vm.monitor.peer_pid, str(local.parent))
    return local if elsewhere is None and local.exists() else None
