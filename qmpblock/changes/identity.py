"""Which QEMU process a change is made in: by what outlives it, and by what does not."""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from qmpblock.changes.record import VMIdentity
from qmpblock.export.server import monitor_name
from qmpblock.host.processes import boot_id, start_time

if TYPE_CHECKING:
    from qmpblock.qemu.connection import Connection

__all__ = ["identify"]

#: What was asked once of a connection is so as long as that lasts.
_known: WeakKeyDictionary[Connection, VMIdentity] = WeakKeyDictionary()


async def identify(vm: Connection) -> VMIdentity:
    """Say which QEMU process this is."""
    if vm not in _known:
        _known[vm] = await _identify(vm)
    return _known[vm]


async def _identify(vm: Connection) -> VMIdentity:
    told, called = await vm.monitor.read("query-uuid", "query-name")
    uuid, name = str(told["UUID"]), str(called.get("name", ""))
    pid = vm.monitor.peer_pid or 0
    return VMIdentity(
        name=name,
        uuid=uuid if len(uuid) == 36 and uuid.replace("-", "").isalnum() else "unknown",
        pid=pid,
        start=start_time(pid) or 0 if pid else 0,
        boot=boot_id(),
        monitor=monitor_name(vm.monitor),
    )
