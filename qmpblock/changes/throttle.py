"""The guest's I/O limits on a disk: lowered until a pivot has come, and given back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from qmpblock.changes.record import Record
from qmpblock.errors import Error
from qmpblock.graph.model import Device

if TYPE_CHECKING:
    from qmpblock.qemu.connection import Connection

__all__ = ["io_limits", "restore_limits", "slow_down"]

_REQUIRED = ("bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr")
_LIMITS = (
    *_REQUIRED,
    *(f"{key}_max" for key in _REQUIRED),
    *(f"{key}_max_length" for key in _REQUIRED),
    "iops_size",
)


async def io_limits(vm: Connection, device: Device) -> tuple[dict[str, int], str]:
    """Return the I/O limits of a device's backend, and their group; empty where none."""
    for info in await vm.monitor.execute("query-block"):
        if info.get("qdev") in (device.qom_path, device.id) and "inserted" in info:
            inserted = info["inserted"]
            limits = {key: int(inserted[key]) for key in _LIMITS if key in inserted}
            return limits, str(inserted.get("group", ""))
    raise Error(f"{device.name} has no block backend any more: was it unplugged?")


async def slow_down(vm: Connection, device: Device, record: Record, rate: int) -> None:
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
