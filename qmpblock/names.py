"""Names of what we make in a VM and on its host: given here, and read back here. Pure."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from typing import Protocol

__all__ = ["AHEAD_LOCKS", "LOCKS", "ahead_lock_name", "lock_name", "lock_names", "new_run"]

#: What the ids of our disk locks begin with.
LOCKS = "qmpblock-disk-"
#: What the ids of the locks of watchers begin with (`qmpblock.allocation.watch`).
AHEAD_LOCKS = "qmpblock-ahead-"


class Device(Protocol):
    """What a guest's disk goes by in QEMU."""

    @property
    def id(self) -> str | None:
        """Its qdev id."""

    @property
    def qom_path(self) -> str:
        """Its path in QEMU's object tree."""


def new_run() -> str:
    """Return a run id that nobody has."""
    return secrets.token_hex(4)


def lock_name(device: Device) -> str:
    """Return the id of the lock object of a disk."""
    import hashlib

    if device.id is not None:
        return f"{LOCKS}{device.id}"
    return f"{LOCKS}-{hashlib.sha256(device.qom_path.encode()).hexdigest()[:12]}"


def lock_names(devices: Iterable[Device]) -> tuple[str, ...]:
    """Return the ids of the locks of several disks."""
    return tuple(sorted(lock_name(device) for device in devices))


def ahead_lock_name(device: Device) -> str:
    """Return the id of the lock of the watcher of a disk's room."""
    return AHEAD_LOCKS + lock_name(device).removeprefix(LOCKS)
