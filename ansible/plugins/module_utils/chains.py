"""What `qmpblock disks` tells of chains, compared with what a module is asked for."""

from __future__ import annotations


def missing_overlays(disks, overlays, real):
    """Return those disks, of a dict of overlays, in whose chains their overlay is not yet.

    A disk may be called by a name that only the command knows; then any chain counts.

    :param disks: the document of `qmpblock disks`; `real` resolves links in a file's name.
    """
    return [
        disk
        for disk, overlay in overlays.items()
        if not any(
            real(layer["file"]) == real(overlay)
            for one in called(disks, disk) or disks
            for layer in one["layers"]
        )
    ]


def called(disks, name):
    """Return those disks, of the document of `qmpblock disks`, that a name selects."""
    return [
        one
        for one in disks
        if name in (one["device"], one["qom_path"], one["root_node"], one["format_node"])
        or name in [layer["file"] for layer in one["layers"][:1]]
    ]
