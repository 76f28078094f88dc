"""What the two sides of a migration show, both at one moment."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING

from qmpblock.changes.identity import identify
from qmpblock.errors import Error, GraphError, MonitorError, RecordError, StalledError
from qmpblock.host.openfiles import OpenFiles
from qmpblock.host.processes import boot_id, pid_namespace, start_time
from qmpblock.migration.arbiter import decided, is_stopped
from qmpblock.migration.states import Reach, Seen
from qmpblock.names import paused_node, stopped_node

if TYPE_CHECKING:
    from qmpblock.changes.record import VMIdentity
    from qmpblock.migration.record import MigrationRecord
    from qmpblock.qemu.connection import Connection
    from qmpblock.qemu.monitor import Monitor

__all__ = ["has_ended", "look", "look_at_both", "process_of"]

_ANSWER = 5.0  # seconds for a word from a QEMU that is well
_LOOKS = 20
_LOOK = 0.05


async def look_at_both(
    record: MigrationRecord, source: Connection | None, destination: Connection | None
) -> tuple[Seen, Seen]:
    """Return what source and destination show, as it was at one moment.

    The destination goes one way only: what it shows before and after the source was looked at it
    also showed then.

    :param source: None where it cannot be reached; `destination`: likewise.
    :raise StalledError: it changes all the time.
    :raise RecordError: what says where the guest goes on cannot be read.
    """
    there = await look(record, record.destination, destination)
    for _ in range(_LOOKS):
        here = await look(record, record.source, source)
        before, there = there, await look(record, record.destination, destination)
        if there == before:
            return here, there
        await asyncio.sleep(_LOOK)
    raise StalledError(f"the destination does not come to rest: it is {there} now")


async def look(record: MigrationRecord, who: VMIdentity, vm: Connection | None) -> Seen:
    """Return what one side shows.

    :param who: the process that it was.
    :raise RecordError: what says where the guest goes on cannot be read.
    """
    if vm is None or vm.monitor.closed:
        return _lost(record, who)
    monitor = vm.monitor
    try:
        async with asyncio.timeout(_ANSWER):
            # In this order: a migration that has just ended is still seen in the run state.
            migration = str((await monitor.execute("query-migrate")).get("status", "none"))
            run = str((await monitor.execute("query-status"))["status"])
            said = await decided(monitor, record.run)
            nodes = await _nodes(monitor)
            stopped = stopped_node(record.run) in nodes
            if said is not None and not stopped:
                stopped = await is_stopped(monitor, record.run)
    except (GraphError, RecordError):
        raise
    except (TimeoutError, MonitorError, StalledError):
        return await _gone_soon(record, who)
    except Error:  # it refuses what every QEMU answers
        return _lost(record, who)
    paused = paused_node(record.run) in nodes
    return Seen(Reach.ANSWERS, run, migration, said, paused, stopped)


async def _nodes(monitor: Monitor) -> set[str]:
    nodes = await monitor.execute("query-named-block-nodes", {"flat": True})
    return {str(one["node-name"]) for one in nodes}


async def _gone_soon(record: MigrationRecord, who: VMIdentity) -> Seen:
    """Say how one is lost whose connection broke: its process may be about to end."""
    for _ in range(_LOOKS):
        if has_ended(record, who):
            break
        await asyncio.sleep(_LOOK)
    return _lost(record, who)


def _lost(record: MigrationRecord, who: VMIdentity) -> Seen:
    return Seen(Reach.GONE if has_ended(record, who) else Reach.UNREACHABLE)


async def process_of(vm: Connection) -> VMIdentity:
    """Say which QEMU process this is; of one that cannot be seen, with no process.

    Whatever made the monitor's socket, ssh or a manager: its end is not QEMU's.
    """
    said = await identify(vm)
    return said if OpenFiles(vm.monitor.peer_pid).is_qemu else replace(said, pid=0, start=0)


def has_ended(record: MigrationRecord, who: VMIdentity) -> bool:
    """Whether a process has certainly ended: it was one of this host, of this boot."""
    seen_here = who.pid and who.boot == boot_id() and record.pids == pid_namespace()
    return bool(seen_here) and start_time(who.pid) != who.start
