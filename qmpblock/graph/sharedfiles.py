"""Who else has a layer's file open: another node of the VM, or another process. Pure.

With file.locking=off a file can be open twice, and QEMU knows nothing of it: two disks over one
base, each by a node of its own. What is written through the one changes the other under its feet.
Files are compared by what is open (`qmpblock.graph.places`): hard links, symbolic links and
spellings are one file; two parts of a file that do not meet are two. Where they cannot be seen,
names that may be of one file count as such.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterator

from qmpblock.graph.jsonname import said_by
from qmpblock.graph.model import FILTERS, BlockGraph, Layer, Node
from qmpblock.graph.openings import Part, part_of, part_of_node, storage_of
from qmpblock.graph.places import Places, known

__all__ = ["files_of", "second_nodes"]


def files_of(layer: Layer) -> tuple[Node, ...]:
    """Return the protocol nodes that a layer's content and metadata are in."""
    return tuple(node for node in (storage_of(layer), layer.data_file) if node is not None)


def second_nodes(graph: BlockGraph, layer: Layer, places: Places) -> Iterator[Node]:
    """Yield other protocol nodes that have a file of this layer open and are in use.

    :raise UnsupportedError: which part of its file the layer is cannot be told.
    """
    own = {node.name for node in files_of(layer)}
    part = part_of(layer)
    for mine in files_of(layer):
        for other in graph.nodes.values():
            if other.name in own or other.children or not _same(mine, other, places):
                continue
            parts = list(_parts(graph, other))
            apart = mine.name == storage_of(layer).name and part is not None
            if apart and parts and not any(one is None or part.meets(one) for one in parts if part):
                continue
            if graph.users(other.name):
                yield other


def _parts(graph: BlockGraph, node: Node) -> Iterator[Part | None]:
    """Yield which part of a file each node above its protocol node shows; None: all of it."""
    for name in graph.parents(node.name):
        parent = graph.nodes[name]
        if parent.driver in FILTERS:
            yield from _parts(graph, parent)
        else:
            try:
                yield part_of_node(parent)
            except ValueError:
                yield None  # it may be all


def _same(one: Node, other: Node, places: Places) -> bool:
    here, there = known(places, one), known(places, other)
    if here is not None and there is not None:
        return here.file == there.file
    return _may_be_one(_name(one), _name(other))


def _name(node: Node) -> str:
    """Return a file name, also out of a `json:` text."""
    filename = said_by(node.filename).get("filename")
    return filename if isinstance(filename, str) else node.filename


def _may_be_one(one: str, other: str) -> bool:
    if not one or not other or "://" in one or "://" in other or "json:" in (one[:5], other[:5]):
        return bool(one) and one == other
    one, other = posixpath.normpath(one), posixpath.normpath(other)
    if one.startswith("/") == other.startswith("/"):
        return one == other
    full, tail = (one, other) if one.startswith("/") else (other, one)
    while tail.startswith("../"):
        tail = tail.removeprefix("../")
    return full.endswith("/" + tail)
