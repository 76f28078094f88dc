"""Image nodes: what a storage daemon is to be told of a destination's images.

Each is described as the destination has it open: the same files, the same options. On this host the
files are found by the descriptors that QEMU shows, and the keys are those that its own secret
objects hold. A key is no word of a command line: it is handed on in memory
(`qmpblock.host.qemuimg.handed_keys`).
"""

from __future__ import annotations

import stat
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from qmpblock.errors import UNTOUCHED, UnsupportedError, printable
from qmpblock.graph.jsonname import said_by
from qmpblock.graph.options import cache_options, discard_of, key_secret
from qmpblock.graph.places import Place
from qmpblock.host.openfiles import OpenFiles
from qmpblock.host.processes import command_line
from qmpblock.qemu.keys import read_keys

if TYPE_CHECKING:
    from qmpblock.graph.model import Layer, Node
    from qmpblock.host.qemuimg import Key
    from qmpblock.qemu.monitor import Monitor

__all__ = ["ImageNodes", "NodesHere", "mark", "refuse"]


class ImageNodes(ABC):
    """The nodes of a destination's images, for another process on its host. `chain`.

    :param options: of the destination's QEMU, its command line; empty where that is not seen.
    """

    def __init__(self, options: Sequence[str]) -> None:
        self._options = options

    async def chain(self, layers: Sequence[Layer]) -> dict[str, Any]:
        """Return the node of a chain, the active layer's; what that lies on is only read.

        :raise UnsupportedError: an image is of a kind that is not served so.
        """
        node = None
        for layer in reversed(layers):
            node = await self._image(layer, node)
        assert node is not None  # a chain has at least one layer
        return node

    async def _image(self, image: Layer, backing: dict[str, Any] | None) -> dict[str, Any]:
        """Return the node of an image.

        :param backing: the node of what it lies on.
        """
        why = ""
        if image.format not in ("qcow2", "raw", "luks") or image.storage is None or image.between:
            why = "is no plain raw, qcow2 or luks image"
        elif image.format == "raw" and {"offset", "size"} & set(said_by(image.node.filename)):
            why = "is a part of a file"
        if why:
            refuse(image, why)
        assert image.storage is not None  # see above
        opened: dict[str, Any] = {
            "discard": discard_of(self._options, image.node) or "unmap",
            "cache": cache_options(image.node),
            "read-only": image.depth > 0,
        }
        file = self._leaf(image, image.storage) | opened
        made: dict[str, Any] = {"driver": image.format, "file": file, **opened}
        if image.node.detect_zeroes != "off":
            made["detect-zeroes"] = image.node.detect_zeroes
        if image.format == "qcow2":
            made["backing"] = backing  # a header may name one that this one has not
        if image.data_file is not None:
            made["data-file"] = self._leaf(image, image.data_file) | opened
        if image.format == "luks":
            made["key-secret"] = await self._key(image)
        elif image.node.encrypted:
            made["encrypt"] = {"format": "luks", "key-secret": await self._key(image)}
        return made

    @abstractmethod
    def _leaf(self, image: Layer, node: Node) -> dict[str, Any]:
        """Return the node of a file of an image."""

    @abstractmethod
    async def _key(self, image: Layer) -> str:
        """Return by which name the daemon has the key of an image."""


class NodesHere(ImageNodes):
    """Those of a destination on this host.

    :param pid: of the destination's QEMU; `monitor`: its own.
    :ivar keys: that they need, as `handed_keys` takes them.
    """

    def __init__(self, pid: int, monitor: Monitor) -> None:
        super().__init__(command_line(pid))
        self.keys: list[Key] = []
        self._monitor = monitor
        self._files = OpenFiles(pid)
        self._names: dict[str, str] = {}

    def _leaf(self, image: Layer, node: Node) -> dict[str, Any]:
        place = self._files.place(node)
        if not isinstance(place, Place):
            refuse(image, place.reason)
        driver = "host_device" if place.file.is_device else "file"
        return {"driver": driver, "filename": place.here}

    async def _key(self, image: Layer) -> str:
        try:
            secret = key_secret(image)
            if secret not in self._names:
                self.keys += await read_keys(self._monitor, secret)
                self._names[secret] = f"key{len(self.keys) - 1}"
        except UnsupportedError as error:
            refuse(image, f"is encrypted: {error.message}")
        return self._names[secret]


def mark(path: str) -> str:
    """Return which file it is, and when it was last written to or otherwise changed.

    :raise UnsupportedError: it is no regular file.
    """
    status = Path(path).stat()
    if not stat.S_ISREG(status.st_mode):
        raise UnsupportedError(f"{printable(path)} is no file")
    told = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    return ":".join(map(str, told))


def refuse(image: Layer, why: str) -> NoReturn:
    """Say that an image cannot be served so.

    :raise UnsupportedError: always.
    """
    raise UnsupportedError(
        f"a storage daemon cannot have the destination's image {printable(image.file)}: it {why}",
        standing=UNTOUCHED,
        remedy="give the destination a raw, qcow2 or luks image of its own, or "
        "do without the storage daemon",
    )
