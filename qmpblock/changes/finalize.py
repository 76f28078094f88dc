"""What is ours to do while a job of QEMU runs, above all at its end.

- Before a job that drops a link is finalized, what it wrote is flushed (K6; the base of a
  commit of middle layers too: 11 of 12 kills in the four milliseconds after job-finalize lost
  data on 7.2.22 and 11.1.2 without).
- A pivot holds the guest's I/O while it is pending (K5): one fsync, then it is finalized.
- A guest that outruns the job is slowed down, where that is asked for.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qmpblock.cancellation import undisturbed
from qmpblock.changes.backingproof import check_record
from qmpblock.changes.bitmaps import promote_bitmaps
from qmpblock.changes.journal import Journal
from qmpblock.changes.record import PIVOTED, Record
from qmpblock.changes.throttle import slow_down
from qmpblock.errors import (
    BusyError,
    CommandError,
    Error,
    JobError,
    UnsupportedError,
    printable,
)
from qmpblock.graph.layeruse import check_bitmaps
from qmpblock.graph.model import BlockGraph, Device
from qmpblock.names import paused_node
from qmpblock.qemu import ownership
from qmpblock.qemu.instant import instant
from qmpblock.qemu.job import Job, Progress
from qmpblock.qemu.refusals import is_busy

if TYPE_CHECKING:
    from qmpblock.qemu.connection import Connection

__all__ = [
    "before_finalize",
    "bring_home",
    "check_unused",
    "drive",
    "flush",
    "keep_exports_away",
    "pivot",
    "until_unused",
]

_log = logging.getLogger(__name__)
_BUSY = 0.1  # seconds between looks whether somebody else's job has ended
_PATIENCE = 1.0  # seconds of converging before the guest is slowed down, where that is asked


async def drive(
    vm: Connection,
    record: Record,
    journal: Journal | None,
    job: Job,
    device: Device | None,
    *,
    throttle_guest: int = 0,
    held: bool = True,
    crowded: str = "",
    progress: Callable[[Progress], None] | None = None,
) -> None:
    """Follow a job to its end, doing what is ours to do on the way.

    Cancelling stops following; a pivot that has begun is completed first.

    :param device: the job's disk, to flush it and to slow it down; a pivot needs none.
    :param throttle_guest: see `Disk.commit`.
    :param held: whether QEMU refuses to migrate meanwhile (`qmpblock.changes.nomigration`).
        Where it does not, a migration that begins ends the job: it would write on where the
        images have gone.
    :param crowded: what is said, once, where the job waits for room and nobody shows that.
    :param progress: is told what is seen of it.
    :raise JobError: QEMU's verdict is a failure.
    :raise UnsupportedError: a migration began.
    """
    async with AsyncExitStack() as alone:
        driven = _Driven(vm, record, journal, job, device, throttle_guest, held, alone)
        last: Progress | None = None
        async for last in job.follow(converging=vm.stall):
            if progress is not None:
                progress(last)
            if crowded and last.phase == "waiting for room":
                _log.warning("%s", crowded)
                crowded = ""
            await driven.tend(last)
    assert last is not None  # follow() yields at least once, or raises
    if last.error is not None:
        if journal is not None and journal.pivoted:
            journal.mark(**{PIVOTED: False})  # the guest is still on the overlay
        raise JobError(job.id, job.type, last.error)
    await job.dismiss()  # its verdict is known


@dataclass
class _Driven:
    """A job on its way, and how far what is ours to do for it is done."""

    vm: Connection
    record: Record
    journal: Journal | None
    job: Job
    device: Device | None
    throttle_guest: int
    held: bool
    alone: AsyncExitStack  # keeps away, to the job's end, what must not meet its pivot
    asked_at: float | None = None  # when it was asked to pivot
    finalized: bool = False

    async def tend(self, seen: Progress) -> None:
        """Do what is due where the job was seen like this."""
        if not self.held and not self.finalized and seen.status != "concluded":
            await ownership.ask(self.vm.monitor, standing=None)
        if seen.status == "pending":
            if not self.finalized:
                await self._end()
        elif seen.ready and self.job.completion_asked and self.asked_at is None:
            await self._complete()
        elif self._is_outrun(seen):
            await self._slow_down()

    async def _end(self) -> None:
        self.finalized = True
        try:
            await _finalize(self.vm, self.record, self.journal, self.job, self.device)
        except BaseException:
            # A pivot that is pending holds the guest's I/O: not a moment longer.
            await undisturbed(self.job.cancel())
            raise

    async def _complete(self) -> None:
        if self.record.pivot:
            await keep_exports_away(self.vm, (self.record.top,), self.alone)
        await until_unused(self.vm, self.record)
        await promote_bitmaps(self.vm, self.record)
        paused = paused_node(self.record.run)
        if paused in self.record.nodes:
            # Goes on when the job has concluded; where it fails, whoever undoes it sees to that.
            await self.alone.enter_async_context(instant(self.vm, paused))
        self.asked_at = time.monotonic()
        await self.job.complete_now()

    async def _slow_down(self) -> None:
        if self.throttle_guest and self.device is not None and not self.job.guest_slowed:
            self.job.guest_slowed = True
            await slow_down(self.vm, self.device, self.record, self.throttle_guest)

    def _is_outrun(self, seen: Progress) -> bool:
        if seen.lagging:
            return True
        waited = self.asked_at is not None and time.monotonic() - self.asked_at > _PATIENCE
        return waited and seen.remaining > 0


async def bring_home(
    vm: Connection, record: Record, journal: Journal | None, graph: BlockGraph
) -> None:
    """Commit an overlay of ours into the image that it lies on, and have the guest move there.

    Carries on a job that does so already. Cancelled, it is left to whoever comes next.

    :raise JobError: QEMU could not; the guest goes on in the overlay.
    """
    job = Job(vm.monitor, record.job, "commit")
    try:
        if graph.job(record.job) is None:
            if journal is not None and journal.pivoted:
                journal.mark(**{PIVOTED: False})  # somebody cancelled a pivot that was pending
            root = record.top
            for device in graph.devices:
                if device.chain is not None and device.chain.active.node.name == record.top:
                    root = device.chain.root.name
            arguments = {"device": root, "top-node": record.top, "base-node": record.base}
            await _start_home(vm, job, {**arguments, "on-error": job.on_error("enospc")})
        job.complete()
        crowded = (
            f"what the guest wrote meanwhile is in {printable(record.top_file)}, and cannot come "
            f"home to {printable(record.home)}: its file system has no room. Make room there, and "
            "it goes on by itself; until then this waits, whatever interrupts it"
        )
        await drive(vm, record, journal, job, None, crowded=crowded)
    finally:
        job.end()


async def _start_home(vm: Connection, job: Job, arguments: Mapping[str, object]) -> None:
    """Have an overlay of ours come home as soon as nobody else's job is at work below it.

    :raise BusyError: one is, for the stall limit.
    """
    clock = asyncio.get_running_loop().time
    deadline = clock() + vm.stall
    while True:
        try:
            return await job.start("block-commit", arguments)
        except CommandError as error:
            if not is_busy(error):
                raise
            if clock() > deadline:
                raise BusyError(
                    f"an overlay of ours cannot come home: somebody else's job is at work on the "
                    f"image below it, for {vm.stall:g} s by now: {error.description}"
                ) from None
        await asyncio.sleep(_BUSY)


async def _finalize(
    vm: Connection, record: Record, journal: Journal | None, job: Job, device: Device | None
) -> None:
    if record.pivot:
        await undisturbed(pivot(journal, job))
    else:
        assert device is not None  # only a pivot needs none
        await before_finalize(vm, record, device)
        await job.finalize()


async def pivot(journal: Journal | None, job: Job) -> None:
    """Finalize a pending active commit, with the base declared the image to trust before.

    While it is pending the guest's I/O is held and both images hold everything (F13),
    so that the declaration is true from its first moment. Takes two fsyncs, side by side.
    """
    began = time.monotonic()
    if journal is not None:
        journal.mark(**{PIVOTED: True})
    try:
        await job.finalize()
        if journal is not None:
            journal.held.append(time.monotonic() - began)
    except CommandError:
        if journal is not None:
            journal.mark(**{PIVOTED: False})  # somebody cancelled it
        raise


async def before_finalize(vm: Connection, record: Record, device: Device) -> None:
    """Do what must be done while a job that does not pivot waits in `pending`.

    What the job wrote is flushed before the link to where it came from is dropped (K6), and
    dirty bitmaps of layers that leave are merged.

    :raise BusyError: see `check_unused`.
    :raise Error: see `_check_base`.
    """
    await promote_bitmaps(vm, record)
    for target, source, name in record.merges:
        await vm.monitor.execute(
            "block-dirty-bitmap-merge",
            {"node": target, "target": name, "bitmaps": [{"node": source, "name": name}]},
        )
    await until_unused(vm, record, device)


async def keep_exports_away(vm: Connection, nodes: Collection[str], alone: AsyncExitStack) -> None:
    """Have no map of ours come or go while a job pivots, until `alone` is left.

    :param nodes: that go.


    QEMU hung for good, in job-finalize, where an export of the node that goes was deleted in that
    very moment: 1 of 12 maps that were begun there on 11.1.2; with this 0 of 30. 7.2 is not known.
    """
    from qmpblock.export.session import no_exports

    deadline = asyncio.get_running_loop().time() + vm.stall / 2
    while True:
        try:
            await alone.enter_async_context(no_exports(vm.monitor, stall=1))
        except BusyError:
            # Whoever holds the VM's NBD server for long keeps all others away from this disk, too.
            late = asyncio.get_running_loop().time() > deadline
            if late or not set(nodes) & set((await vm.graph()).exports.values()):
                return
        else:
            return


async def until_unused(vm: Connection, record: Record, device: Device | None = None) -> None:
    """Wait until nobody else uses what is to go, or to change: an export may have come since.

    :param device: the disk, if the record's node is to be flushed first.
    :raise BusyError: somebody does for half the stall limit.
    :raise Error: see `_check_base`.
    """
    deadline = asyncio.get_running_loop().time() + vm.stall / 2
    while True:
        try:
            if record.flush and device is not None:
                await flush(vm, device, record.flush)
            graph = await vm.graph()
            check_unused(record, graph)
            _check_base(record, graph, vm)
        except BusyError:  # of an NBD server, or of what the job works on
            if asyncio.get_running_loop().time() > deadline:
                raise
            await asyncio.sleep(1)
        else:
            return


def _check_base(record: Record, graph: BlockGraph, vm: Connection) -> None:
    """Refuse to end a job where the name of what stays below has come to lead elsewhere.

    :raise Error: it has; QEMU would find other data, or none, at the next start.
    """
    try:
        check_record(record, graph, vm.monitor.peer_pid)
    except UnsupportedError as error:
        raise Error(error.message, remedy=error.remedy) from None


def check_unused(record: Record, graph: BlockGraph) -> None:
    """Refuse to end a job under somebody who has come since it began.

    `qmpblock.chains.plan` looks before.

    :raise BusyError: somebody uses a dirty bitmap of a layer that goes, or reads what changes.
    """
    going = [*(node for node, _ in record.leaving), *record.nodes]
    check_bitmaps(graph, going)
    record.check_readers(graph)


async def flush(vm: Connection, device: Device, node: str) -> None:
    """Flush a node: what was written to it before is on stable storage when this returns.

    By NBD_CMD_FLUSH on a read-only export: QMP has no command for it.
    """
    from qmpblock.export.session import Request, exports

    async with exports(vm.monitor, device, [Request(node, ())], access=vm.nbd, stall=vm.stall) as [
        client
    ]:
        await client.flush()
