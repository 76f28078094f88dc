"""Host space of the destination's images: whether they can have it as it is asked for. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from qmpblock.errors import printable
from qmpblock.migration.diskterms import Allocation
from qmpblock.migration.machine import GuestDisk

__all__ = ["space_differs"]

_HOLES = (10, 0, 0)  # from which version on zeros in a raw image take no space anyhow


def space_differs(
    here: GuestDisk, there: GuestDisk, version: tuple[int, int, int], allocation: Allocation
) -> Iterator[tuple[str, str]]:
    """Say why a disk's image cannot have its host space as it is asked for: name and words.

    :param version: of the destination's QEMU.
    """
    checks = {"full": _full, "same": _same}
    why = checks[allocation](here, there, version) if allocation in checks else ""
    if why:
        yield "space", f"{printable(there.file)} is to have host space ({allocation}): {why}"


def _full(here: GuestDisk, there: GuestDisk, _: tuple[int, int, int]) -> str:
    if there.on_device and there.format == "raw":
        return ""  # it has
    if there.zeroes == "unmap":
        return "zeros that are written to it are given back (detect-zeroes=unmap)"
    if there.format != "raw" and (there.taken or 0) < (here.size or 0):
        return (
            f"it has {there.taken or 0} bytes of {here.size}, and a {printable(there.format)} "
            "image gets all of it only as it is made"
        )
    return ""


def _same(here: GuestDisk, there: GuestDisk, version: tuple[int, int, int]) -> str:
    if there.on_device or here.on_device:
        return "a block device has what it has by itself"
    if here.encrypted:
        return "of an encrypted disk its key alone tells which zeros have any"
    if there.zeroes != "off":
        return f"zeros that are written to it have none (detect-zeroes={there.zeroes})"
    if there.format == "raw" and not there.holes and version < _HOLES:
        return "whether zeros have none in it cannot be told, or is not so (discard=ignore)"
    return ""
