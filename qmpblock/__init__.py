"""Disks of running QEMU virtual machines: live maps, allocation, jobs.

Start with `connect`. Names are imported when they are first used, so that
`import qmpblock` alone costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from qmpblock._version import __version__

if TYPE_CHECKING:
    from qmpblock.allocation.allocate import AllocationResult
    from qmpblock.allocation.room import RoomResult
    from qmpblock.allocation.thin import Allocator
    from qmpblock.changes.imagerecovery import recover_images
    from qmpblock.copying.verify import Verification, verify_images
    from qmpblock.errors import Error
    from qmpblock.extents.allocationmap import AllocationMap
    from qmpblock.host.closedimage import ClosedImage, ImageLayer, closed_image
    from qmpblock.inventory.listing import RunningVM, vms
    from qmpblock.mapping import LayerMap
    from qmpblock.migration.job import MigrationJob, MigrationResult
    from qmpblock.migration.means import MigrationMeans
    from qmpblock.migration.migrate import migrate
    from qmpblock.migration.recover import recover_migration
    from qmpblock.qemu.job import Job, Progress
    from qmpblock.qemu.monitor import Monitor
    from qmpblock.speed import Speed
    from qmpblock.vm import VM, Disk, connect

__all__ = [
    "VM",
    "AllocationMap",
    "AllocationResult",
    "Allocator",
    "ClosedImage",
    "Disk",
    "Error",
    "ImageLayer",
    "Job",
    "LayerMap",
    "MigrationJob",
    "MigrationMeans",
    "MigrationResult",
    "Monitor",
    "Progress",
    "RoomResult",
    "RunningVM",
    "Speed",
    "Verification",
    "__version__",
    "closed_image",
    "connect",
    "migrate",
    "recover_images",
    "recover_migration",
    "verify_images",
    "vms",
]

_HOMES = {
    "AllocationMap": "extents.allocationmap",
    "AllocationResult": "allocation.allocate",
    "Allocator": "allocation.thin",
    "ClosedImage": "host.closedimage",
    "Disk": "vm",
    "Error": "errors",
    "ImageLayer": "host.closedimage",
    "Job": "qemu.job",
    "LayerMap": "mapping",
    "MigrationJob": "migration.job",
    "MigrationMeans": "migration.means",
    "MigrationResult": "migration.job",
    "Monitor": "qemu.monitor",
    "Progress": "qemu.job",
    "RoomResult": "allocation.room",
    "RunningVM": "inventory.listing",
    "Speed": "speed",
    "VM": "vm",
    "Verification": "copying.verify",
    "closed_image": "host.closedimage",
    "connect": "vm",
    "migrate": "migration.migrate",
    "recover_images": "changes.imagerecovery",
    "recover_migration": "migration.recover",
    "verify_images": "copying.verify",
    "vms": "inventory.listing",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"qmpblock.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
