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

Where QEMU reads right, what it tells of the status is of the disk's active layer alone: what lies
in those below is told as a hole that is not zeros (K28). A reader may take that for zeros, as
`qemu-img compare` does. So for readers from outside the root is a quorum there, too, of the view
alone: all that does not read as zeros is data. A disk of one layer needs none.

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


async def add_view(
    vm: Connection, name: str, filter_: str, size: int, *, whole: bool = False
) -> None:
    """Add the node by which a filter's disk is read as it was.

    :param size: of the disk, in bytes.
    :param whole: whether its block status is to be that of all layers, not of the active one.
    :raise CommandError: QEMU refused.
    """
    misread = vm.capabilities.views_misread
    options = view_node(name, filter_, size, in_pieces=misread, whole=whole)
    try:
        await vm.monitor.execute("blockdev-add", options)
    except CommandError as error:
        if misread:
            error.remedy = (
                f"QEMU {vm.capabilities} needs its drivers quorum, blkdebug and null-co to show "
                "a disk as it was without fault (K37); 10.0 and newer do not"
            )
        elif whole:
            error.remedy = (
                f"QEMU {vm.capabilities} needs its driver quorum to tell readers of a disk with "
                "backing images where it holds data (K28); one without needs none"
            )
        raise


def view_node(
    name: str, filter_: str, size: int, *, in_pieces: bool, whole: bool = False
) -> dict[str, Any]:
    """Return its options.

    :param in_pieces: whether QEMU misreads it otherwise (`Capabilities.views_misread`).
    :param whole: whether its block status is to be that of all layers.
    """
    view: dict[str, Any] = {"driver": "snapshot-access", "file": filter_}
    root = {
        "driver": "quorum",
        "node-name": name,
        "vote-threshold": 1,
        "read-pattern": "fifo",
        "read-only": True,
    }
    if not in_pieces:
        return {**root, "children": [view]} if whole else {**view, "node-name": name}
    pieces = {"driver": "blkdebug", "align": UNIT, "max-transfer": UNIT, "image": view}
    fails = {"event": "none", "iotype": "read", "errno": errno.EACCES, "immediately": True}
    refusing = {
        "driver": "blkdebug",
        "inject-error": [fails],
        "image": {"driver": "null-co", "size": size, "read-zeroes": False},
    }
    return {**root, "children": [pieces, refusing]}
