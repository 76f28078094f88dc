"""What a disk's active layer lies on: every file of the layers below it, as it is now.

It costs nothing worth naming: a stat(2) for each, by the very file that QEMU has open.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from qmpblock.backups.lower import ELSEWHERE, SEEN, UNSEEN
from qmpblock.backups.point import LowerFile
from qmpblock.errors import UnsupportedError
from qmpblock.graph.openings import part_of
from qmpblock.graph.places import Missing

if TYPE_CHECKING:
    from qmpblock.graph.model import BlockGraph, DiskDevice, Layer, Node
    from qmpblock.host.openfiles import OpenFiles

__all__ = ["lower_files"]


def lower_files(graph: BlockGraph, device: DiskDevice, files: OpenFiles) -> tuple[LowerFile, ...]:
    """Return the files that the active layer of a disk lies on, from above.

    Of a layer all: its data file, what a vmdk's extents are in, the parts of a quorum.

    :param files: that the VM has open.
    """
    return tuple(
        _seen(layer, node, files)
        for layer in device.chain.layers[1:]
        for node in _leaves(graph, layer)
    )


def _leaves(graph: BlockGraph, layer: Layer) -> Iterator[Node]:
    """Yield the protocol nodes under a layer, each once, those of its backing image left out."""
    known = {layer.node.name}
    below = [edge for edge in layer.node.children if edge.name != "backing"]
    if not below:
        yield layer.node
    edges = sorted(below, key=lambda edge: edge.name, reverse=True)
    while edges:
        name = edges.pop().node
        if name in known or name not in graph.nodes:
            continue
        known.add(name)
        node = graph.nodes[name]
        if not node.children:
            yield node
        edges += sorted(node.children, key=lambda edge: edge.name, reverse=True)


def _seen(layer: Layer, node: Node, files: OpenFiles) -> LowerFile:
    try:
        part = part_of(layer)
    except UnsupportedError:
        part = None  # as far as can be told: its file is looked at all the same
    one = LowerFile(
        file=node.filename,
        format=layer.format,
        size=layer.size,
        offset=0 if part is None else part.offset,
        told=UNSEEN,
    )
    place = files.place(node)
    if isinstance(place, Missing):
        return replace(one, told=ELSEWHERE) if place.certain else one
    status = files.status(place.file)
    if status is None or place.file.is_device:
        return one
    return replace(
        one,
        told=SEEN,
        length=status.st_size,
        modified=status.st_mtime_ns,
        inode=status.st_ino,
    )
