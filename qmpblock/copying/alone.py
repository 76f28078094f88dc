"""Disks that others may write to as well: what is copied of one would be of no moment.

Neither a filter over the guest's image nor a mirror of it is passed by what another QEMU writes
there, and an overlay takes only what this guest writes. Nobody tells of it, and no job fails.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qmpblock.errors import UNTOUCHED, CommandError, UnsupportedError

if TYPE_CHECKING:
    from qmpblock.graph.model import DiskDevice
    from qmpblock.qemu.monitor import Monitor

__all__ = ["check_alone"]


async def check_alone(monitor: Monitor, device: DiskDevice) -> None:
    """Refuse a disk that others may write to (`share-rw=on`).

    :raise UnsupportedError: it is one; nothing was touched.
    """
    asked = {"path": device.qom_path, "property": "share-rw"}
    try:
        shared = await monitor.execute("qom-get", asked)
    except CommandError:
        return  # this kind of device has no such property
    if shared:
        raise UnsupportedError(
            f"{device.name} has share-rw=on: others may write to its image, and what they write "
            "would be seen in what is to be of one instant, or be missing",
            standing=UNTOUCHED,
            remedy="give the device share-rw=off if nobody else writes; else copy the image when "
            "nobody does",
        )
