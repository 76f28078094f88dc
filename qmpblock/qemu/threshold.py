"""Write thresholds: the one that a node has, and the lock that says it is ours.

QEMU sends BLOCK_WRITE_THRESHOLD once, when a write to a node ends beyond an offset
(block-set-write-threshold; qapi/block-core.json). Who sets one holds a lock that names the node and
the offsets before they are set, so that whoever finds it dead can take its threshold away, and
nobody else's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from qmpblock.errors import CommandError
from qmpblock.graph.model import BlockGraph
from qmpblock.names import ahead_lock_name
from qmpblock.qemu import lock
from qmpblock.qemu.lock import Holder

if TYPE_CHECKING:
    from qmpblock.graph.model import Device
    from qmpblock.qemu.connection import Connection

__all__ = ["Watch", "disarm", "disarm_dead", "is_watched", "set_threshold"]


@dataclass(frozen=True)
class Watch:
    """What the holder of a watcher's lock says: the node, and the offsets that may be its own."""

    node: str | None
    offsets: tuple[int, ...]
    more: Mapping[str, Any] = field(default_factory=dict)


async def is_watched(vm: Connection, device: Device) -> bool:
    """Whether a watcher of ours keeps a disk's room: its write threshold follows the guest."""
    return await lock.read(vm.monitor, ahead_lock_name(device)) is not None


async def disarm_dead(vm: Connection, dead: Holder) -> None:
    """Take away the write threshold that a dead watcher left. Idempotent.

    :raise RecordError: which one it is cannot be read: nothing is touched.
    """
    if dead.is_idle:
        return
    watch = dead.says(Watch)
    if watch.node is not None:
        await disarm(vm, await vm.graph(), watch.node, watch.offsets)


async def disarm(vm: Connection, graph: BlockGraph, name: str, offsets: Sequence[int]) -> None:
    """Take a threshold away if it is one of those; one that somebody else set stays."""
    node = graph.nodes.get(name)
    if node is None or node.write_threshold not in offsets or not node.write_threshold:
        return
    try:
        await set_threshold(vm, name, 0)
    except CommandError:
        if name in (await vm.graph()).nodes:
            raise  # else it went away with its node


async def set_threshold(vm: Connection, node: str, offset: int) -> None:
    """Have QEMU tell, once, of a write to a node that ends beyond `offset` bytes; 0: of none.

    :raise CommandError: there is no such node, or it cannot.
    """
    await vm.monitor.execute(
        "block-set-write-threshold", {"node-name": node, "write-threshold": offset}
    )
