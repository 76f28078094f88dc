"""Disks of running QEMU virtual machines: live maps, allocation, jobs.

Start with `connect`. Names are imported when they are first used, so that
`import qmpblock` alone costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from qmpblock._version import __version__

if TYPE_CHECKING:
    from qmpblock.allocation import AllocationResult
    from qmpblock.disk import Disk, LayerMap
    from qmpblock.errors import Error
    from qmpblock.extents import AllocationMap
    from qmpblock.headroom import RoomResult
    from qmpblock.imagerecovery import recover_images
    from qmpblock.job import Job, Progress
    from qmpblock.monitor import Monitor
    from qmpblock.pace import Speed
    from qmpblock.thin import Allocator
    from qmpblock.vm import VM, connect

__all__ = [
    "VM",
    "AllocationMap",
    "AllocationResult",
    "Allocator",
    "Disk",
    "Error",
    "Job",
    "LayerMap",
    "Monitor",
    "Progress",
    "RoomResult",
    "Speed",
    "__version__",
    "connect",
    "recover_images",
]

_HOMES = {
    "AllocationMap": "extents",
    "AllocationResult": "allocation",
    "Allocator": "thin",
    "Disk": "disk",
    "Error": "errors",
    "Job": "job",
    "LayerMap": "disk",
    "Monitor": "monitor",
    "Progress": "job",
    "RoomResult": "headroom",
    "Speed": "pace",
    "VM": "vm",
    "connect": "vm",
    "recover_images": "imagerecovery",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"qmpblock.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
