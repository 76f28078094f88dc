"""Dirty bitmaps of layers: made persistent where they go on, removed where they do not."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from qmpblock.changes.record import Record
from qmpblock.errors import CommandError, printable
from qmpblock.qemu.refusals import bitmap_is_fixed, not_found

if TYPE_CHECKING:
    from qmpblock.qemu.connection import Connection

__all__ = ["delete_bitmap", "promote_bitmaps"]

_log = logging.getLogger(__name__)


async def promote_bitmaps(vm: Connection, record: Record) -> None:
    """Make transient bitmaps of a node that a job writes to persistent. Idempotent.

    Before the job the node is read-only, and QEMU refuses a persistent one (11.1) or loses it
    (7.2). So a transient one records from the start, and is merged into the persistent one.
    """
    for node, helper, name, granularity in record.promotions:
        known = (await vm.graph()).nodes[node].bitmaps
        if not any(bitmap.name == helper for bitmap in known):
            continue
        if not any(bitmap.name == name for bitmap in known):
            await vm.monitor.execute(
                "block-dirty-bitmap-add",
                {"node": node, "name": name, "granularity": granularity, "persistent": True},
            )
        await vm.monitor.execute(
            "block-dirty-bitmap-merge", {"node": node, "target": name, "bitmaps": [helper]}
        )
        await delete_bitmap(vm, node, helper)


async def delete_bitmap(vm: Connection, node: str, name: str) -> None:
    """Remove a dirty bitmap of ours, unless its node has become read-only with it stored."""
    try:
        await vm.monitor.execute("block-dirty-bitmap-remove", {"node": node, "name": name})
    except CommandError as error:
        if not_found(error):
            return
        if not bitmap_is_fixed(error):
            raise
        _log.warning(
            "the dirty bitmap %s stays in %s, which is read-only now: QEMU says %s",
            printable(name),
            printable(node),
            printable(error.description),
        )
