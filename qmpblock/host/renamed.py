"""What to call an image that is not under the name any more by which QEMU opened it.

QEMU goes on naming it so, though the file was renamed, replaced or removed since, and by then
that name may be another file's. Which file it is nobody says; but if of all images that the VM
has open (by their locks) there is one that no node's name leads to, and one such node, they go
together.
"""

from __future__ import annotations

from qmpblock.graph.model import Layer
from qmpblock.graph.places import Missing, Place, Places
from qmpblock.host.filelocks import images_of
from qmpblock.host.openfiles import OpenFiles

__all__ = ["name_now"]


def name_now(layer: Layer, files: OpenFiles, places: Places) -> str | None:
    """Return what a layer's file is called: as QEMU does, unless that is known to be wrong.

    :param files: that the VM has open; also `places`, of all its nodes.
    :return: None where no name is known that leads to it.
    """
    storage = layer.storage
    place = places.get(storage.name) if storage is not None else None
    if not _is_lost(place):
        return layer.file
    named = {one.file for one in places.values() if isinstance(one, Place)}
    strays = images_of(files) - named
    lost = [one for one in places.values() if _is_lost(one)]
    if len(strays) == len(lost) == 1:
        return files.name_of(strays.pop())
    return None


def _is_lost(place: Place | Missing | None) -> bool:
    return isinstance(place, Missing) and place.certain
