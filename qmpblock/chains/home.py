"""A home for an overlay of ours that holds a guest's newest data for a while: beside its image.

Whoever comes after a crash, and knows the image only, has to find the overlay, and the journal that
says what it is. So it lies in the very directory of the image, on this host, under a name that
begins as the image's does; where that cannot be, there is none.
"""

from __future__ import annotations

import posixpath
from pathlib import Path
from typing import TYPE_CHECKING

from qmpblock.chains.overlay import open_directory
from qmpblock.errors import UNTOUCHED, UnsupportedError, printable
from qmpblock.graph.places import Place
from qmpblock.host import imagefiles
from qmpblock.host.openfiles import OpenFiles, sees_directory

if TYPE_CHECKING:
    from qmpblock.graph.model import Layer
    from qmpblock.host.ourfiles import Directory
    from qmpblock.qemu.connection import Connection

__all__ = ["home_file", "open_home", "written"]


async def home_file(vm: Connection, active: Layer) -> str:
    """Return the path of an active image here, beside which an overlay can lie.

    :raise UnsupportedError: it is not on this host, or not at that name, or a block device.
    :raise DisconnectedError: QEMU has gone meanwhile.
    """
    pid = vm.monitor.peer_pid
    async with vm.unless_gone():
        file = imagefiles.local_path(pid, active)
        if file is None:
            raise _no_overlay(active, imagefiles.why_not_local(pid, active))
        file = imagefiles.home_of(file)
        elsewhere = sees_directory(pid, posixpath.dirname(file))
        if elsewhere is not None:
            raise _no_overlay(active, f"is there, but its directory {elsewhere}")
    return file


def written(vm: Connection, active: Layer, file: str) -> tuple[tuple[str, int], ...]:
    """Return the files that an overlay's content comes home to: the image, its data file.

    Each with its inode, by what the VM has open.
    """
    files = OpenFiles(vm.monitor.peer_pid)
    names = []
    for node, name in ((active.storage, file), (active.data_file, None)):
        place = files.place(node) if node is not None else None
        if isinstance(place, Place):
            # Of a block device, what a name of it had; it is told by its number otherwise.
            inode = place.file.inode
            inode = Path(place.here).stat().st_ino if inode is None else inode
            names.append((name or place.here, inode))
    return tuple(names)


async def open_home(vm: Connection, active: Layer, file: str) -> Directory:
    """Open the directory of the active image: the one in which it is, not only by its name.

    :raise Error: it is another one by now.
    :raise DisconnectedError: QEMU has gone meanwhile.
    """
    async with vm.unless_gone():
        directory = open_directory(file)
        assert active.storage is not None  # home_file found its file
        place = OpenFiles(vm.monitor.peer_pid).place(active.storage)
        if isinstance(place, Place) and directory.holds(posixpath.basename(file), place.file):
            return directory
        directory.close()
        raise _no_overlay(active, "was moved just now")


def _no_overlay(active: Layer, reason: str) -> UnsupportedError:
    return UnsupportedError(
        f"{printable(active.file)}, beside which an overlay must lie for a while, {reason}",
        standing=UNTOUCHED,
        remedy="run qmpblock on the VM's host, by a UNIX monitor, as the VM's user or root; the "
        "image must be a file there, under the name by which the VM has it",
    )
