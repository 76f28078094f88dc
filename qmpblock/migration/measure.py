"""Measuring what a guest writes, for some seconds: to its disks and to its memory.

QEMU counts what devices write, and samples pages on request (`calc-dirty-rate`), which costs the
guest nothing that it would notice.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from qmpblock.errors import CommandError, GraphError
from qmpblock.graph.model import DiskDevice
from qmpblock.migration.predict import Load
from qmpblock.qemu.connection import Connection
from qmpblock.qemu.monitor import Monitor

__all__ = ["measure"]

_MIB = 1 << 20
#: Bytes of a block of memory below which QEMU samples none of it.
_SMALLEST = 128 << 20
_POLL = 0.05  # seconds
_LATE = 10.0  # seconds that a measurement may take longer than it should


async def measure(vm: Connection, devices: Iterable[DiskDevice], seconds: int = 1) -> Load:
    """Look on for some seconds. A guest that stands writes nothing.

    :param seconds: at least 1.
    """
    execute = vm.monitor.execute
    known = list(devices)
    if not (await execute("query-status"))["running"]:
        return Load({device.name: 0.0 for device in known}, 0.0)
    memory = await execute("query-memory-size-summary")
    sampled = memory["base-memory"] >= _SMALLEST and await _begin(vm.monitor, seconds)
    loop = asyncio.get_running_loop()
    began, before = loop.time(), await _written(vm.monitor)
    await asyncio.sleep(seconds)
    ended, after = loop.time(), await _written(vm.monitor)
    disks = {
        device.name: max(0, after.get(device.qom_path, 0) - before.get(device.qom_path, 0))
        / (ended - began)
        for device in known
    }
    return Load(disks, await _sampled(vm.monitor) if sampled else None)


async def _written(monitor: Monitor) -> dict[str, int]:
    """Return how many bytes were written, by the devices' places in QEMU's object tree."""
    stats = await monitor.execute("query-blockstats")
    try:
        return {str(one["qdev"]): int(one["stats"]["wr_bytes"]) for one in stats if "qdev" in one}
    except (KeyError, TypeError, ValueError):
        raise GraphError("QEMU's answer makes no sense: what was written to a disk") from None


async def _begin(monitor: Monitor, seconds: int) -> bool:
    """Have QEMU sample pages; whether it does, or did already for somebody else."""
    try:
        await monitor.execute("calc-dirty-rate", {"calc-time": seconds})
    except CommandError:
        return str((await monitor.execute("query-dirty-rate"))["status"]) == "measuring"
    return True


async def _sampled(monitor: Monitor) -> float | None:
    loop = asyncio.get_running_loop()
    deadline = loop.time() + _LATE
    while loop.time() < deadline:
        found = await monitor.execute("query-dirty-rate")
        if found["status"] == "measured":
            return float(found["dirty-rate"]) * _MIB
        await asyncio.sleep(_POLL)
    return None
