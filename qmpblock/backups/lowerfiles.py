"""What a disk's active layer lies on: every file of the layers below it, as it is now.

It costs nothing worth naming: a stat(2) for each, by the very file that QEMU has open.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from qmpblock.backups.lower import ELSEWHERE, SEEN, UNSEEN
from qmpblock.backups.point import LowerFile
from qmpblock.errors import UnsupportedError
from qmpblock.graph.openings import part_of
from qmpblock.graph.places import FileId, Place, Places

if TYPE_CHECKING:
    from qmpblock.graph.model import BlockGraph, DiskDevice, Layer, Node
    from qmpblock.host.openfiles import OpenFiles

__all__ = ["lower_files"]


def lower_files(
    graph: BlockGraph, devices: Sequence[DiskDevice], files: OpenFiles
) -> list[tuple[LowerFile, ...]]:
    """Return the files that the active layer of each disk lies on, from above.

    Of a layer all: its data file, what a vmdk's extents are in, the parts of a quorum.

    :param graph: of the whole VM; `files`: that it has open.
    """
    places = files.places(graph.nodes.values())
    doubtful = _doubtful(places, files)
    return [
        tuple(
            _seen(layer, node, places, files, doubtful)
            for layer in device.chain.layers[1:]
            for node in _leaves(graph, layer)
        )
        for device in devices
    ]


def _doubtful(places: Places, files: OpenFiles) -> frozenset[FileId]:
    """Return the files to which names of more nodes lead than QEMU has opened them for.

    A node has a descriptor of its own. So one of these names leads to another file than when it was
    opened: a link was set to what another disk lies on, say.
    """
    named = Counter(place.file for place in places.values() if isinstance(place, Place))
    return frozenset(file for file, count in named.items() if count > len(files.descriptors(file)))


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


def _seen(
    layer: Layer, node: Node, places: Places, files: OpenFiles, doubtful: frozenset[FileId]
) -> LowerFile:
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
    place = places.get(node.name)
    if not isinstance(place, Place):
        return replace(one, told=ELSEWHERE) if place is not None and place.certain else one
    if place.file in doubtful:
        return replace(one, told=ELSEWHERE)
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
