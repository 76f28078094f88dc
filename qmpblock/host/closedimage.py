"""The map of a closed image, which no running VM uses: by qemu-img, and by FIEMAP what is reserved.

The counterpart of `qmpblock.mapping`, for a chain that is only on disk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qmpblock.host.imagechain import blockdev, format_of
from qmpblock.host.qemuimg import QemuImg
from qmpblock.sizes import check_range

if TYPE_CHECKING:
    import os

    from qmpblock.extents.allocationmap import AllocationMap
    from qmpblock.host.imagechain import Image
    from qmpblock.ranges import Ranges

__all__ = ["ClosedImage", "ImageLayer", "closed_image"]


@dataclass(frozen=True)
class ImageLayer:
    """One image of a closed chain, and what it itself holds, whatever lies above it.

    :ivar depth: 0 is the active layer, 1 its backing image, and so on.
    :ivar file: its path, resolved against the image that names it.
    :ivar format: as given or recorded, never probed.
    :ivar size: virtual size in bytes.
    :ivar map: depth is 0 throughout; present says whether this layer holds the range.
    """

    depth: int
    file: str
    format: str
    size: int
    map: AllocationMap


async def closed_image(
    path: str | os.PathLike[str],
    *,
    format: str | None = None,  # noqa: A002 - the command's word
    stall: float = 60.0,
) -> ClosedImage:
    """Look at an image that no running VM writes to, and follow its backing links.

    It is read by qemu-img with the rights of its owner, and each backing image with those of
    whoever owns the image that names it. Of plain qcow2 images only the headers are read here;
    what else is wrong with them, the map says.

    :param format: of the image itself; None: as the suffix of its name tells. It is never probed,
        because a guest can forge its content; nor is that of a backing image.
    :param stall: seconds in which qemu-img does nothing that count as a failure.
    :raise NotFoundError: there is no such file.
    :raise RequestError: nothing tells a format, or the chain is endless.
    :raise UnsupportedError: a backing file is not a local file, or its format is not recorded, or
        the owner of the image that names it may not come to it.
    :raise ToolError: qemu-img is not here, or cannot read one of them; or a running VM holds the
        image. Of a plain qcow2 image `map` raises that.
    :raise StalledError: qemu-img does nothing for the stall limit.
    """
    tool, name = QemuImg(stall=stall), str(path)
    return ClosedImage(tool, await tool.chain(name, format or format_of(name), by_headers=True))


class ClosedImage:
    """An image with its chain, as far as it can be read. Get it from `closed_image`.

    Nothing is held: each call runs qemu-img anew, on the chain as it was found.

    :ivar chain: its images, the active one first.
    """

    def __init__(self, tool: QemuImg, chain: tuple[Image, ...]) -> None:
        self.chain = chain
        self._tool = tool

    def __repr__(self) -> str:
        return f"<ClosedImage {self.chain[0].file!r}: {len(self.chain)} layers>"

    @property
    def size(self) -> int:
        """Virtual size in bytes."""
        return self.chain[0].size

    @property
    def options(self) -> dict[str, Any]:
        """How QEMU is to open it, with all that lies below it, as for blockdev-add."""
        top = self.chain[0]
        return blockdev(top.format, top.file, self.chain[1:])

    async def map(
        self, offset: int = 0, length: int | None = None, *, reserved: bool = False
    ) -> AllocationMap:
        """Map what a guest would see: for every byte, which layer supplies it, and how.

        :param offset: first byte, at any alignment.
        :param length: in bytes; by default up to the end.
        :param reserved: also mark what raw layers have fallocated but not written (by FIEMAP).
        :raise RangeError: the range is not inside the image.
        :raise Error: see `closed_image`.
        """
        offset, length = check_range(self.size, offset, length)
        seen = await self._tool.map(self.options, [one.format for one in self.chain])
        if reserved:
            for depth, image in enumerate(self.chain):
                supplied = seen.where(depth=depth, present=True)
                seen = seen.with_reserved(_fallocated(image) & supplied)
        return seen.clip(offset, length)

    async def layers(self, *, reserved: bool = False) -> tuple[ImageLayer, ...]:
        """Map what each image itself holds, the active one first.

        :param reserved: as for `map`.
        :raise Error: see `closed_image`.
        """
        layers = []
        for depth, image in enumerate(self.chain):
            alone = blockdev(image.format, image.file)
            own = (await self._tool.map(alone, [image.format], opener=image.opener)).own()
            if reserved:
                own = own.with_reserved(_fallocated(image))
            layers.append(ImageLayer(depth, image.file, image.format, image.size, own))
        return tuple(layers)


def _fallocated(image: Image) -> Ranges:
    """Return what a raw image has fallocated but not written; empty where that cannot be told."""
    from qmpblock.ranges import Ranges

    if image.format != "raw":
        return Ranges()
    from qmpblock.host.space import reserved_ranges

    return reserved_ranges(image.file, image.size) or Ranges()
