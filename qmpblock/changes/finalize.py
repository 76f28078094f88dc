"""Driving: what is ours to do while a job of QEMU runs, above all at its end.

- Before a job that drops a link is finalized, what it wrote is flushed (K6; the base of a
  commit of middle layers too: 11 of 12 kills in the four milliseconds after job-finalize lost
  data on 7.2.22 and 11.1.2 without).
- A pivot holds the guest's I/O while it is pending (K5): one fsync, then it is finalized.
- A guest that outruns the job is slowed down, where that is asked for.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Mapping
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

from qmpblock.cancellation import undisturbed
from qmpblock.changes.backingproof import check_record
from qmpblock.changes.journal import Journal
from qmpblock.changes.record import PIVOTED, Record
from qmpblock.errors import (
    UNTOUCHED,
    BusyError,
    CommandError,
    Error,
    JobError,
    UnsupportedError,
    printable,
)
from qmpblock.graph.layeruse import check_bitmaps
from qmpblock.graph.model import BlockGraph, Device, Layer, Node
from qmpblock.graph.options import key_secret, overlay_options
from qmpblock.qemu import ownership
from qmpblock.qemu.capabilities import Capabilities
from qmpblock.qemu.job import Job, Progress

if TYPE_CHECKING:
    from qmpblock.qemu.connection import Connection

__all__ = [
    "before_finalize",
    "bring_home",
    "check_copy_on_read",
    "check_unused",
    "delete_bitmap",
    "drive",
    "flush",
    "io_limits",
    "pivot",
    "promote_bitmaps",
    "relink",
    "restore_discard",
    "restore_limits",
    "restore_zeroes",
    "set_detect_zeroes",
    "set_writable",
]

_log = logging.getLogger(__name__)
# What QEMU lets a node be called, by people or by itself; it goes into a command line.
_NODE_NAME = re.compile(r"[A-Za-z#][A-Za-z0-9_.-]*")
_PATIENCE = 1.0  # seconds of converging before the guest is slowed down, where that is asked
_REQUIRED = ("bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr")
_LIMITS = (
    *_REQUIRED,
    *(f"{key}_max" for key in _REQUIRED),
    *(f"{key}_max_length" for key in _REQUIRED),
    "iops_size",
)


async def drive(
    vm: Connection,
    record: Record,
    journal: Journal | None,
    job: Job,
    device: Device | None,
    *,
    throttle_guest: int = 0,
    held: bool = True,
) -> None:
    """Follow a job to its end, doing what is ours to do on the way.

    Cancelling stops following; a pivot that has begun is completed first.

    :param device: the job's disk, to flush it and to slow it down; a pivot needs none.
    :param throttle_guest: see `Disk.commit`.
    :param held: whether QEMU refuses to migrate meanwhile (`qmpblock.changes.nomigration`).
        Where it does not, a migration that begins ends the job: it would write on where the
        images have gone.
    :raise JobError: QEMU's verdict is a failure.
    :raise UnsupportedError: a migration began.
    """
    async with AsyncExitStack() as alone:
        await _drive(vm, record, journal, job, device, throttle_guest, alone, held=held)


async def _drive(
    vm: Connection,
    record: Record,
    journal: Journal | None,
    job: Job,
    device: Device | None,
    throttle_guest: int,
    alone: AsyncExitStack,
    *,
    held: bool,
) -> None:
    asked, finalized, slowed = False, False, False
    asked_at = 0.0
    last: Progress | None = None
    async for seen in job.follow(converging=vm.stall):
        last = seen
        if not held and not finalized and seen.status != "concluded":
            await ownership.ask(vm.monitor, standing=None)
        if seen.status == "pending" and not finalized:
            finalized = True
            try:
                await _finalize(vm, record, journal, job, device)
            except BaseException:
                # A pivot that is pending holds the guest's I/O: not a moment longer.
                await undisturbed(job.cancel())
                raise
        elif seen.ready and job.completion_asked and not asked:
            if record.pivot:
                await _keep_exports_away(vm, record, alone)
            await _until_unused(vm, record)
            asked, asked_at = True, time.monotonic()
            await promote_bitmaps(vm, record)
            await job.complete_now()
        elif throttle_guest and device is not None and not slowed:
            waited = asked and time.monotonic() - asked_at > _PATIENCE
            if seen.lagging or (waited and seen.remaining):
                slowed = True
                await _slow_down(vm, device, record, throttle_guest)
    assert last is not None  # follow() yields at least once, or raises
    if last.error is not None and journal is not None and journal.pivoted:
        journal.mark(**{PIVOTED: False})  # the guest is still on the overlay
    if last.error is not None:
        raise JobError(job.id, job.type, last.error)


def check_copy_on_read(capabilities: Capabilities, into: Layer) -> None:
    """Refuse to have QEMU copy on read into a layer where that would kill it.

    :raise UnsupportedError: see `Capabilities.copy_on_read_breaks_subclusters`.
    """
    if into.node.subclusters and capabilities.copy_on_read_breaks_subclusters:
        raise UnsupportedError(
            f"{printable(into.file)} has subclusters (extended_l2), and QEMU {capabilities} aborts "
            "when it copies from a backing image into such an image",
            standing=UNTOUCHED,
            remedy="commit instead, or use QEMU 10.0 or newer",
        )


async def relink(vm: Connection, node: str, below: str, graph: BlockGraph) -> None:
    """Have an overlay of ours lie on its image itself, without what was put between.

    Where QEMU refuses, what is between is brought home too, if there is room for it.

    :param node: the overlay's; `below`: the image's.
    """
    top = graph.nodes[node]
    storage = top.child("file")
    assert storage is not None  # an overlay of ours has a file
    try:
        secret = key_secret(Layer(0, top, None)) if top.encrypted else None
        options = overlay_options(node, storage, top, secret, below)
        await vm.monitor.execute("blockdev-reopen", {"options": [options]})
    except (CommandError, UnsupportedError) as error:
        _log.warning("%s stays where it is: %s", node, error)


async def set_detect_zeroes(vm: Connection, node: str, value: str) -> None:
    """Change one option of a node, and see that it is so.

    blockdev-reopen would give all others their defaults, what they are no command tells, and
    it refuses nodes that QEMU named itself (those of -drive). qemu-io's `reopen` keeps them.

    :param value: `off`, `on` or `unmap`.
    :raise UnsupportedError: it had no effect.
    """
    found, said = await _reopen(vm, node, f"-o detect-zeroes={value}")
    if found is not None and found.detect_zeroes == value:
        return
    raise UnsupportedError(
        f"QEMU does not set detect-zeroes of {printable(node)} to {value}: {printable(said)}"
    )


async def set_writable(vm: Connection, node: str) -> None:
    """Make a node writable again that a snapshot has made read-only, as a commit job does.

    Only if it has: where QEMU cannot open the file again by its name (a relative one, and
    -daemonize), the snapshot left the node as it was, and to reopen it would spoil it: a job that
    writes to it then fails ("Could not open").

    :raise UnsupportedError: it had no effect.
    """
    known = (await vm.graph()).nodes.get(node)
    if known is not None and not known.read_only:
        return
    found, said = await _reopen(vm, node, "-w")
    if found is None or found.read_only:
        raise UnsupportedError(f"QEMU does not make {printable(node)} writable: {printable(said)}")


async def _reopen(vm: Connection, node: str, options: str) -> tuple[Node | None, str]:
    """Reopen a node by qemu-io; return it as it is afterwards, and what QEMU said."""
    said = "the node's name cannot be put on a command line"
    if _NODE_NAME.fullmatch(node):
        line = f'qemu-io {node} "reopen {options}"'
        said = await vm.monitor.execute("human-monitor-command", {"command-line": line})
    # By the graph, which waits where a query of the nodes would crash QEMU 7.2 (K7).
    return (await vm.graph()).nodes.get(node), said


async def restore_zeroes(vm: Connection, node: str, value: str) -> None:
    """Give a node its detect-zeroes back; that must not keep an overlay from coming home."""
    try:
        await set_detect_zeroes(vm, node, value)
    except (CommandError, UnsupportedError) as error:
        _log.warning("%s", error)


async def restore_discard(vm: Connection, node: str, value: str) -> None:
    """Give the base the `discard` of the layer that the guest comes from.

    Nothing tells whether it is so, but that QEMU does not complain. Idempotent.
    """
    if not _NODE_NAME.fullmatch(node):
        _log.warning("the name of %s cannot be put on a command line", printable(node))
        return
    line = f'qemu-io {node} "reopen -o discard={value}"'
    said = await vm.monitor.execute("human-monitor-command", {"command-line": line})
    if said:
        _log.warning(
            "QEMU does not set discard of %s to %s: %s",
            printable(node),
            value,
            printable(said.strip()),
        )


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
            await job.start("block-commit", {**arguments, "on-error": "enospc"})
        job.complete()
        await drive(vm, record, journal, job, None)
    finally:
        job.end()


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
    await _until_unused(vm, record, device)


async def _keep_exports_away(vm: Connection, record: Record, alone: AsyncExitStack) -> None:
    """Have no map of ours come or go while the job pivots, until `alone` is left.

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
            if late or record.top not in (await vm.graph()).exports.values():
                return
        else:
            return


async def _until_unused(vm: Connection, record: Record, device: Device | None = None) -> None:
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


async def promote_bitmaps(vm: Connection, record: Record) -> None:
    """Make transient bitmaps of a node that a job writes to persistent. Idempotent.

    Before the job the node is read-only, and QEMU refuses a persistent one (11.1) or loses it
    (7.2). So a transient one records from the start, and is merged into the persistent one.
    """
    for node, helper, name, granularity in record.promotions:
        known = (await vm.graph()).nodes[node].bitmaps
        if not any(bitmap.name == helper for bitmap in known):
            continue
        if not any(bitmap.name == name for bitmap in known):
            await vm.monitor.execute(
                "block-dirty-bitmap-add",
                {"node": node, "name": name, "granularity": granularity, "persistent": True},
            )
        await vm.monitor.execute(
            "block-dirty-bitmap-merge", {"node": node, "target": name, "bitmaps": [helper]}
        )
        await delete_bitmap(vm, node, helper)


async def delete_bitmap(vm: Connection, node: str, name: str) -> None:
    """Remove a dirty bitmap of ours, unless its node has become read-only with it stored."""
    try:
        await vm.monitor.execute("block-dirty-bitmap-remove", {"node": node, "name": name})
    except CommandError as error:
        if "not found" in error.description:
            return
        if "read-only" not in error.description and "No write access" not in error.description:
            raise
        _log.warning(
            "the dirty bitmap %s stays in %s, which is read-only now: QEMU says %s",
            printable(name),
            printable(node),
            printable(error.description),
        )


async def io_limits(vm: Connection, device: Device) -> tuple[dict[str, int], str]:
    """Return the I/O limits of a device's backend, and their group; empty where none."""
    for info in await vm.monitor.execute("query-block"):
        if info.get("qdev") in (device.qom_path, device.id) and "inserted" in info:
            inserted = info["inserted"]
            limits = {key: int(inserted[key]) for key in _LIMITS if key in inserted}
            return limits, str(inserted.get("group", ""))
    raise Error(f"{device.name} has no block backend any more: was it unplugged?")


async def _slow_down(vm: Connection, device: Device, record: Record, rate: int) -> None:
    """Limit the guest's I/O on a disk, where it is not limited further already."""
    before = dict(record.throttle)
    total = before.get("bps", 0)
    limits = {key: before.get(key, 0) for key in _REQUIRED}
    limits |= {"bps": min(total, rate) if total else rate, "bps_rd": 0, "bps_wr": 0}
    await _set_io_limits(vm, device, limits, record.throttle_group)


async def _set_io_limits(
    vm: Connection, device: Device, limits: Mapping[str, int], group: str
) -> None:
    arguments: dict[str, object] = {"id": device.qom_path, **dict.fromkeys(_REQUIRED, 0), **limits}
    if group:
        arguments["group"] = group
    await vm.monitor.execute("block_set_io_throttle", arguments)


async def restore_limits(
    vm: Connection, device: Device, before: Mapping[str, int], group: str
) -> None:
    """Give the guest back the I/O limits that it had before."""
    if device.chain is None:
        return  # unplugged, and its limits with it
    now, _ = await io_limits(vm, device)
    if now != before:
        await _set_io_limits(vm, device, before, group)
