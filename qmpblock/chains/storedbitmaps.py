"""Persistent dirty bitmaps of an image that is frozen, and whether it can be written to again.

QEMU opens an image anew, by its name, to make it read-only, and fixes its bitmaps before. Where it
cannot open it, it takes that for no error, and leaves the image writable and its bitmaps fixed:
whatever writes to the image then fails, nothing tells why, and nothing mends it (K42).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qmpblock.errors import CommandError, UnsupportedError, printable
from qmpblock.graph.openings import storage_of
from qmpblock.qemu.refusals import bitmap_is_fixed, could_not_open

if TYPE_CHECKING:
    from qmpblock.graph.model import Layer
    from qmpblock.qemu.monitor import Monitor

__all__ = ["check_frozen_ones", "check_opened_anew", "may_hold_bitmaps"]

_FILES = ("file", "host_device")


async def check_opened_anew(monitor: Monitor, layer: Layer, node: str) -> None:
    """Refuse to have an image frozen that QEMU could not open anew, where that would spoil it.

    :param node: a name of ours, under which it is tried.
    :raise UnsupportedError: it has persistent bitmaps, and QEMU does not find it by its name.
    """
    kept = [bitmap.name for bitmap in layer.node.bitmaps if bitmap.persistent]
    if not kept:
        return
    refused = await _refused(monitor, layer, node)
    if refused is not None:
        name, error = refused
        raise UnsupportedError(
            f"{printable(name)} cannot be opened anew by QEMU, which a snapshot would "
            f"have it do ({printable(error.description)}); it has the persistent dirty bitmap "
            f"{printable(kept[0])}, and so could never be written to again: each write of the "
            "guest's would fail once it is back on it",
            remedy="start the VM with absolute paths of its images (with -daemonize it leaves "
            "the directory of relative ones), which its user may open; a set of descriptors "
            "needs one for reading, too. Or remove the bitmap first "
            "(block-dirty-bitmap-remove)",
        ) from error


async def may_hold_bitmaps(monitor: Monitor, layer: Layer, node: str) -> bool:
    """Whether an image could be frozen, too, if it had persistent bitmaps: QEMU can open it anew.

    :param node: a name of ours, under which it is tried.
    """
    return await _refused(monitor, layer, node) is None


async def _refused(monitor: Monitor, layer: Layer, node: str) -> tuple[str, CommandError] | None:
    """Return the name by which QEMU does not open an image anew, and its words; None: it does."""
    for file in (storage_of(layer), layer.data_file):
        if file is None or file.driver not in _FILES or file.filename.startswith("json:"):
            continue
        options = {"driver": file.driver, "node-name": node, "filename": file.filename}
        try:
            # Another opening of QEMU's own would be in the way of its locks.
            await monitor.execute("blockdev-add", options | {"read-only": True, "locking": "off"})
        except CommandError as error:
            if not could_not_open(error):
                raise
            return file.filename, error
        await monitor.execute("blockdev-del", {"node-name": node})
    return None


async def check_frozen_ones(monitor: Monitor, base: Layer) -> None:
    """Refuse to have the guest go over to an image to which nothing can be written any more.

    :raise UnsupportedError: somebody's snapshot has left it so.
    """
    if base.node.read_only:
        return  # QEMU opens it anew to write to it, and its bitmaps are as before then
    for bitmap in base.node.bitmaps:
        if not bitmap.persistent or bitmap.inconsistent or bitmap.busy:
            continue
        # What it marks is marked already: QEMU only says whether it could be changed.
        itself = {"node": base.node.name, "target": bitmap.name, "bitmaps": [bitmap.name]}
        try:
            await monitor.execute("block-dirty-bitmap-merge", itself)
        except CommandError as error:
            if not bitmap_is_fixed(error):
                raise
            raise UnsupportedError(
                f"nothing can be written to {printable(base.file)} any more: a snapshot could not "
                "have QEMU open it anew, and left its persistent dirty bitmap "
                f"{printable(bitmap.name)} fixed ({printable(error.description)}). On it each "
                "write of the guest's would fail",
                remedy="stream instead, or copy the disk and have the guest go over: it is well "
                "where it is. The VM's next start mends it",
            ) from error
