"""Image files of a running VM that are on this host too.

Which file is the VM's, its own descriptors tell (`qmpblock.host.openfiles`).
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from qmpblock.graph.places import Missing, Place
from qmpblock.host.openfiles import OpenFiles

if TYPE_CHECKING:
    from qmpblock.graph.model import Chain, Layer

__all__ = [
    "home_of",
    "image_files",
    "images_of",
    "local_path",
    "open_inodes",
    "status_of",
    "why_not_local",
]


def local_path(pid: int | None, layer: Layer) -> str | None:
    """Return a path on this host to the layer's image file, or None.

    :param pid: the process at the other end of the monitor.
    """
    place = _place(pid, layer)
    return place.here if isinstance(place, Place) and not place.file.is_device else None


def home_of(path: str) -> str:
    """Return the name of an image beside which others look for it, whatever link they came by.

    That is its real one; the given one where that leads elsewhere (/proc/PID/root).
    """
    real = Path(os.path.realpath(path))
    return str(real) if real.exists() and real.samefile(path) else path


def image_files(pid: int | None, chain: Chain) -> tuple[str, ...]:
    """Return the image files of a chain, by their paths on this host where they have one.

    :param pid: the process at the other end of the monitor.
    """
    files = OpenFiles(pid)
    paths = []
    for layer in chain.layers:
        place = files.place(layer.storage or layer.node)
        if not isinstance(place, Place):
            paths.append(layer.file)
        else:
            paths.append(place.here if place.file.is_device else home_of(place.here))
    return tuple(paths)


def images_of(pid: int | None, chains: Iterable[Chain]) -> tuple[str, ...]:
    """Return the image files of several chains, the active ones first (`image_files`)."""
    every = [image_files(pid, chain) for chain in chains]
    return (*(files[0] for files in every), *(file for files in every for file in files[1:]))


def why_not_local(pid: int | None, layer: Layer) -> str:
    """Say why `local_path` returned None, in words that follow the file's name."""
    place = _place(pid, layer)
    if isinstance(place, Missing):
        return place.reason
    return "is a block device" if place.file.is_device else "has just come to be known here"


def status_of(pid: int | None, layer: Layer) -> os.stat_result | None:
    """Return stat(2) of the very file that the layer is stored in; None where it is not here."""
    place = _place(pid, layer)
    return OpenFiles(pid).status(place.file) if isinstance(place, Place) else None


def _place(pid: int | None, layer: Layer) -> Place | Missing:
    if layer.storage is None:
        return Missing("has no file of its own")
    return OpenFiles(pid).place(layer.storage)


def open_inodes(pid: int) -> set[tuple[int, int]]:
    """Return the device and inode of every file that a process has open, as far as we may look."""
    return {(one.device, one.inode) for one in OpenFiles(pid).ids() if one.inode is not None}
