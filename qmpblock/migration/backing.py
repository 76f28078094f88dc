"""What the destination's images lie on, where only active layers are copied onto them. Pure.

Of such a disk the guest reads the rest through the destination's backing image, from its first
moment there on. So that has to be what it is at the source, byte for byte, which nothing shows but
that both have the very same files open; or the user says so. What contradicts it counts anyway.
"""

from __future__ import annotations

from collections.abc import Iterator

from qmpblock.errors import printable
from qmpblock.migration.machine import FileIdentity, GuestDisk, LowerLayer, Machine

__all__ = ["backing_differs", "own_images"]

_OVERLAYS = ("qcow2",)  # formats of which a mirror's zeros are known to hide what lies below (K2)


def backing_differs(
    here: GuestDisk, there: GuestDisk, *, trusted: bool
) -> Iterator[tuple[str, str]]:
    """Say what speaks against copying the active layer of a disk alone: name and words.

    :param trusted: whether the user says that both backing images hold the same.
    """
    if not here.below:
        return  # of one layer all is copied
    name, file = here.describe(), printable(there.file)
    if not there.below or there.format not in _OVERLAYS:
        what = "lies on none" if not there.below else f"is {printable(there.format)}"
        yield "backing-missing", f"{name} lies on an image, and {file} {what}"
        return
    if here.below[0].size != there.below[0].size:
        yield (
            "backing-size",
            (
                f"what {name} lies on has {here.below[0].size} bytes, and {there.below[0].size} "
                f"what {file} lies on"
            ),
        )
    elif not _same(here.below, there.below) and not trusted:
        yield (
            "backing-unproven",
            f"that {file} lies on what {name} lies on is not seen: {_why(here, there)}",
        )
    if not there.names_backing:
        yield "backing-unnamed", f"the header of {file} does not say on which image it lies"


def own_images(machine: Machine) -> dict[FileIdentity, str]:
    """Return the files that a VM's disks are in, each with its name for people."""
    found: dict[FileIdentity, str] = {}
    for disk in machine.disks:
        for layer in disk.below:
            found |= dict.fromkeys(layer.files or (), layer.file)
        if disk.identity is not None:
            found[disk.identity] = disk.file
    return found


def _same(here: tuple[LowerLayer, ...], there: tuple[LowerLayer, ...]) -> bool:
    """Whether both are the very same images, opened alike."""
    return len(here) == len(there) and all(
        one.files is not None
        and (one.files, one.part, one.format, one.size)
        == (other.files, other.part, other.format, other.size)
        for one, other in zip(here, there, strict=True)
    )


def _why(here: GuestDisk, there: GuestDisk) -> str:
    if len(here.below) != len(there.below):
        return f"on {len(here.below)} images, there on {len(there.below)}"
    for one, other in zip(here.below, there.below, strict=True):
        both = f"{printable(one.file)} and {printable(other.file)}"
        if one.files is None or other.files is None:
            return f"which files {both} are"
        if (one.files, one.part) != (other.files, other.part):
            return f"{both} are not the same file"
        if (one.format, one.size) != (other.format, other.size):
            return f"{both} are one file, opened in two ways"
    raise AssertionError("they are the same")
