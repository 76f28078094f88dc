"""How an image is opened: what its file name and its format do not say. Pure.

    file    |..........|== part ==|.......|      raw with offset and size
    file    |..........|= qcow2 ==|.......|      an image inside such a part
    file    |= qcow2 =| + data file              named on the command line only

QEMU tells of a part in the `json:` file name that it makes of such a raw node (those of the nodes
above may be cut off); of a data file it tells which one the header names. Such an image needs a
description (the options of blockdev-add, as JSON); any other opens by its file name and format.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from qmpblock.errors import UNTOUCHED, UnsupportedError, printable
from qmpblock.graph.jsonname import as_bytes, said_by
from qmpblock.graph.model import Layer, Node
from qmpblock.graph.places import Places, known

__all__ = [
    "Part",
    "description",
    "in_part",
    "is_plain",
    "no_name",
    "part_of",
    "part_of_node",
    "storage_of",
]


@dataclass(frozen=True)
class Part:
    """A part of a file that a raw node shows.

    :ivar size: None where it reaches to the file's end.
    """

    offset: int
    size: int | None

    @property
    def options(self) -> dict[str, int]:
        """As blockdev-add has them."""
        given = {"offset": self.offset}
        return given if self.size is None else given | {"size": self.size}

    def meets(self, other: Part) -> bool:
        """Whether the two have a byte in common."""
        return self._before(other.offset) and other._before(self.offset)

    def _before(self, offset: int) -> bool:
        return self.size is None or offset < self.offset + self.size


def storage_of(layer: Layer) -> Node:
    """Return the protocol node of a layer: its own where it has no other."""
    return layer.storage or layer.node


def part_of(layer: Layer) -> Part | None:
    """Return which part of its file a layer is in; None where it is the whole.

    :raise UnsupportedError: that cannot be told.
    """
    parts = [part for _, part in _levels(layer) if part is not None]
    if len(parts) > 1 or (parts and layer.data_file is not None):
        raise no_name(layer, "it lies in a part of a part of a file, or its data file in one")
    return parts[0] if parts else None


def in_part(layer: Layer) -> bool:
    """Whether an image lies in a part of its file: byte 0 of the one is not that of the other.

    Where that cannot be told it counts as such.
    """
    try:
        return part_of(layer) is not None
    except UnsupportedError:
        return True


def part_of_node(node: Node) -> Part | None:
    """Return which part a raw node shows of what lies below it; None where it shows all.

    :raise ValueError: it does not say it so that it can be read.
    """
    if node.driver != "raw" or not node.filename.startswith("json:"):
        return None
    options = said_by(node.filename)
    if not options:
        raise ValueError("its options are cut off")
    offset, size = options.get("offset"), options.get("size")
    if offset is None and size is None:
        return None
    return Part(as_bytes(offset or 0), None if size is None else as_bytes(size))


def is_plain(layer: Layer, places: Places) -> bool:
    """Whether an image opens as it is by its file name and its format."""
    return not in_part(layer) and _by_header(layer, places)


def description(layer: Layer, places: Places) -> dict[str, Any]:
    """Describe how an image is opened, with absolute file names.

    :raise UnsupportedError: that cannot be told.
    """
    levels = list(_levels(layer))
    part, place = part_of(layer), known(places, layer.storage)
    if layer.node.encrypted:
        raise no_name(layer, "it is encrypted, and not the whole of what its file name opens")
    if place is None or any(driver != "raw" for driver, _ in levels[1:]):
        raise no_name(layer, "it is not the whole of what its file name opens")
    assert layer.storage is not None  # it has a place
    inner: dict[str, Any] = {"driver": layer.storage.driver, "filename": place.path}
    mine = levels[0][1] if levels else None
    if part is not None and mine is None:
        inner = {"driver": "raw", **part.options, "file": inner}
    options = {"driver": layer.format, **(mine.options if mine else {}), "file": inner}
    if layer.data_file is not None and not _by_header(layer, places):
        there = known(places, layer.data_file)
        if there is None:
            name = printable(layer.data_file.filename)
            raise no_name(layer, f"where its data file {name} is cannot be told")
        options["data-file"] = {"driver": layer.data_file.driver, "filename": there.path}
    return options


def no_name(layer: Layer, reason: str) -> UnsupportedError:
    """Return what is raised where no name leads back to an image."""
    return UnsupportedError(
        f"no name could be recorded that leads back to @{layer.depth} {printable(layer.file)} as "
        f"the VM has it open: {reason}",
        standing=UNTOUCHED,
        remedy="copy the disk into an image of its own",
    )


def _levels(layer: Layer) -> Iterator[tuple[str, Part | None]]:
    """Yield the driver of each node from the format node to above the file, filters left out."""
    for node in (layer.node, *layer.between):
        if node.is_filter:
            continue
        try:
            yield node.driver, part_of_node(node)
        except ValueError:
            raise no_name(layer, "which part of its file it is cannot be read") from None


def _by_header(layer: Layer, places: Places) -> bool:
    """Whether the data file, if there is one, is the one that the image's header names."""
    if layer.data_file is None:
        return True
    recorded, place = layer.node.data_filename, known(places, layer.data_file)
    if recorded is None:
        return False
    # Where it is relative it counts from QEMU's directory, as ever: nothing changes for it.
    return recorded == layer.data_file.filename or (
        place is not None and recorded in (place.path, place.real)
    )
