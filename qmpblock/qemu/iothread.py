"""IOThreads: which one a device's disk runs in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qmpblock.errors import UNTOUCHED, CommandError, UnsupportedError
from qmpblock.graph.model import Device
from qmpblock.qemu.monitor import Monitor

__all__ = ["iothread_of"]


async def iothread_of(
    monitor: Monitor, device: Device, iothreads: Sequence[dict[str, Any]]
) -> str | None:
    """Return the id of the iothread of the device, or of the controller that it hangs on.

    :param iothreads: what query-iothreads says of the VM.
    :raise UnsupportedError: the VM has iothreads, and it cannot be told.
    """
    if not iothreads:
        return None
    path = device.qom_path.removesuffix("/virtio-backend")
    for _ in range(8):  # device, bus, controller; QEMU's trees are not deeper
        try:
            iothread = await monitor.execute("qom-get", {"path": path, "property": "iothread"})
        except CommandError:
            iothread = ""  # this kind of device has no such property; look further up
        if iothread:
            return str(iothread).rpartition("/")[2]
        try:
            bus = await monitor.execute("qom-get", {"path": path, "property": "parent_bus"})
        except CommandError:
            return None
        path = str(bus).rpartition("/")[0].removesuffix("/virtio-backend")
        if not path.startswith("/machine/") or "/" not in path.removeprefix("/machine/"):
            return None
    raise UnsupportedError(
        f"whether {device.name} runs in an iothread cannot be told",
        standing=UNTOUCHED,
        remedy="use QEMU 10.0 or newer",
    )
