"""Measuring the wire between the two VMs of a migration, before anything is copied.

By the very way by which disks will be copied: an export of the destination's NBD server, our relay,
QEMU's NBD client. But from nothing to nothing: at both ends lies a null-co node, which holds no
data, takes all that is written, and is ours. No image is read or written::

    source                              destination
    null-co -> blockdev-backup -> nbd -> relay -> export -> null-co

A backup sends all of it, though it is nothing (F35). It ends after 128 MiB, or four seconds. The
disks of both VMs are locked meanwhile, as for the migration itself; whoever finds a dead one's
locks takes away what it made.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from qmpblock.cancellation import undisturbed
from qmpblock.changes.change import Change
from qmpblock.changes.copies import Migration
from qmpblock.changes.identity import identify
from qmpblock.copying.wire import Wire, wire_socket
from qmpblock.errors import JobError
from qmpblock.host.imagefiles import images_of
from qmpblock.migration.landing import Landing
from qmpblock.migration.predict import WireSpeed
from qmpblock.names import lock_names, measuring_job, new_run, null_node, wire_node
from qmpblock.qemu import lock
from qmpblock.qemu.job import Job
from qmpblock.qemu.refusals import no_node, tolerate

if TYPE_CHECKING:
    from qmpblock.migration.over import Over
    from qmpblock.qemu.connection import Connection

__all__ = ["measure_wire"]

_MOST = 128 << 20  # bytes that are sent
_LONGEST = 4.0  # seconds
_LOOK = 0.01


async def measure_wire(
    source: Connection, destination: Connection, over: Over | None = None
) -> WireSpeed:
    """Send nothing to nowhere, for four seconds at most. Cancelling leaves nothing, either.

    :param over: by which network; None: as the monitors.
    :raise BusyError: another controller is at work in one of them.
    :raise Error: it cannot be measured; nothing is left, or it says what.
    """
    run = new_run()
    disks, arriving = (await source.graph()).disks(), (await destination.graph()).disks()
    null, node = null_node(run), wire_node(run, 0)
    record = Migration(
        run=run,
        vm=await identify(source),
        devices=tuple(device.qom_path for device in disks),
        names=tuple(device.name for device in disks),
        locks=lock_names(disks),
        helpers=(measuring_job(run),),
        nodes=(null, node),
        wires=((node, wire_socket(run)),),
        images=images_of(source.monitor.peer_pid, [device.chain for device in disks]),
    )
    change = Change(source, record, journaled=False)
    landing = Landing(destination, run, arriving, lambda: False, over=over)
    await change.begin()
    try:
        await landing.lock(serving=1, nodes=[null])
        await _add_null(destination, null)
        [target] = await undisturbed(landing.serve_nodes([null]))
        here = None if over is None else over.here
        async with Wire.open(source, target, run=run, credentials=here) as wire:
            await _add_null(source, null)
            job = Job(source.monitor, measuring_job(run), "backup")
            try:
                return await _measured(source, job, wire, null)
            finally:
                await undisturbed(_end(job, wire))
                await undisturbed(landing.end_exports())  # before anything closes the wire (K1)
    finally:
        try:
            await undisturbed(_leave(change, landing, null))
        except BaseException:
            lock.abandon(run)  # whoever comes next takes away what could not be
            raise


async def _measured(source: Connection, job: Job, wire: Wire, null: str) -> WireSpeed:
    """Have it sent, until there is no more, or it has taken long enough."""
    began = time.monotonic()
    await source.monitor.execute(
        "blockdev-backup",
        {
            "job-id": job.id,
            "device": null,
            "target": wire.node,
            "sync": "full",
            "auto-dismiss": False,
        },
    )
    moments = [(began, 0)]
    while time.monotonic() - began < _LONGEST:
        info = await job.look()
        if info is None or info.get("error"):
            raise JobError(job.id, job.type, str((info or {}).get("error", "somebody ended it")))
        done = int(info["current-progress"])
        if done > moments[-1][1]:
            moments.append((time.monotonic(), done))
        if info["status"] == "concluded":
            break
        await asyncio.sleep(_LOOK)
    # The first answer comes later than those that follow it.
    first, last = moments[1 if len(moments) > 2 else 0], moments[-1]
    rate = (last[1] - first[1]) / (last[0] - first[0]) if last[0] > first[0] else 0.0
    return WireSpeed(rate, wire.relay.quickest or 0.0)


async def _end(job: Job, wire: Wire) -> None:
    """End the job; what it has sent and is not answered yet may take long: that is cut off."""
    info = await job.look()
    if info is not None and info["status"] != "concluded":
        wire.cut()
        await job.cancel()
        await job.wait_concluded()
    job.end()


async def _leave(change: Change[Migration], landing: Landing, null: str) -> None:
    """Take away all that is left at both ends."""
    await change.undo()
    await landing.end_exports()
    await tolerate(no_node, landing.vm.monitor.execute("blockdev-del", {"node-name": null}))
    await landing.leave()


async def _add_null(vm: Connection, name: str) -> None:
    options = {"driver": "null-co", "node-name": name, "size": _MOST, "read-zeroes": False}
    await vm.monitor.execute("blockdev-add", options)
