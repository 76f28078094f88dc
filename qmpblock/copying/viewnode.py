"""View node: by which a disk is read as it was, whatever this QEMU makes of such reads.

A snapshot-access node over the filter that keeps what was there. Where QEMU errs in a read that
begins in what is kept and goes past it, and in the block status of that (K37), no read may do so,
and nobody may be told a status. So there the node of that name is the root of a tree::

    quorum -+-> pieces -> snapshot-access -> filter       read
            +-> refusing -> nothing                       read only where the first fails

- *pieces*, a blkdebug node, aligns reads to the filter's unit, and cuts them into such: each is
  of one unit, which is kept or is not.
- *quorum* reads the first child (`fifo`), and has no holes where one of its children has none.
  *Nothing*, a null-co node that promises no zeros, has none: all is data.
- Where the first fails, for the point has ended, quorum asks the next: *refusing*, another blkdebug
  node, fails as that did, so that nobody gets anything else.

What hangs on the root goes with it.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

from qmpblock.errors import CommandError

if TYPE_CHECKING:
    from qmpblock.qemu.connection import Connection

__all__ = ["UNIT", "add_view", "view_node"]

UNIT = 64 << 10
"""Bytes that the filter keeps at once."""


async def add_view(vm: Connection, name: str, filter_: str, size: int) -> None:
    """Add the node by which a filter's disk is read as it was.

    :param size: of the disk, in bytes.
    :raise CommandError: QEMU refused.
    """
    misread = vm.capabilities.views_misread
    options = view_node(name, filter_, size, in_pieces=misread)
    try:
        await vm.monitor.execute("blockdev-add", options)
    except CommandError as error:
        if misread:
            error.remedy = (
                f"QEMU {vm.capabilities} needs its drivers quorum, blkdebug and null-co to show "
                "a disk as it was without fault (K37); 10.0 and newer do not"
            )
        raise


def view_node(name: str, filter_: str, size: int, *, in_pieces: bool) -> dict[str, Any]:
    """Return its options.

    :param in_pieces: whether QEMU misreads it otherwise (`Capabilities.views_misread`).
    """
    view: dict[str, Any] = {"driver": "snapshot-access", "file": filter_}
    if not in_pieces:
        return {**view, "node-name": name}
    pieces = {"driver": "blkdebug", "align": UNIT, "max-transfer": UNIT, "image": view}
    fails = {"event": "none", "iotype": "read", "errno": errno.EACCES, "immediately": True}
    refusing = {
        "driver": "blkdebug",
        "inject-error": [fails],
        "image": {"driver": "null-co", "size": size, "read-zeroes": False},
    }
    return {
        "driver": "quorum",
        "node-name": name,
        "children": [pieces, refusing],
        "vote-threshold": 1,
        "read-pattern": "fifo",
        "read-only": True,
    }
