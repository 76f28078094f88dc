"""Where the files are that a VM has open: what is told of them. Pure.

`qmpblock.host.openfiles` finds it out.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qmpblock.graph.model import Node

__all__ = ["FileId", "Missing", "Place", "Places", "known"]


@dataclass(frozen=True)
class FileId:
    """Which file: what all its names lead to.

    :ivar device: that it lies on; of a block device its own number.
    :ivar inode: None of a block device, to which any node with its number leads.
    """

    device: int
    inode: int | None

    @classmethod
    def of(cls, status: os.stat_result) -> FileId | None:
        """Tell it from stat(2); None of what is no regular file and no block device."""
        if stat.S_ISBLK(status.st_mode):
            return cls(status.st_rdev, None)
        if stat.S_ISREG(status.st_mode):
            return cls(status.st_dev, status.st_ino)
        return None

    @property
    def is_device(self) -> bool:
        """Whether it is a block device."""
        return self.inode is None


@dataclass(frozen=True)
class Place:
    """Where a file that a VM has open is.

    :ivar file: which one.
    :ivar path: an absolute name that leads to it as QEMU sees files; the one that QEMU was
        given, where that is absolute.
    :ivar real: the same through no directory that is a link.
    :ivar here: a name that leads to it as this process sees files.
    :ivar linked: whether the name itself is a link into another directory, so that what a
        header names beside it lies elsewhere when it is opened by its other name.
    """

    file: FileId
    path: str
    real: str
    here: str
    linked: bool = False


@dataclass(frozen=True)
class Missing:
    """Why no name is known that leads to a file.

    :ivar reason: in words that follow the file's name.
    :ivar certain: whether QEMU's files can be seen, and the name does not lead to this one;
        if not, it cannot be told.
    """

    reason: str
    certain: bool = False


#: Of protocol nodes, by their names.
Places = Mapping[str, Place | Missing]


def known(places: Places, node: Node | None) -> Place | None:
    """Return where a node's file is, where that is known."""
    place = places.get(node.name) if node is not None else None
    return place if isinstance(place, Place) else None
