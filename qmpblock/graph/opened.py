"""How an image is opened, as options that open it again, from outside and after a crash. Pure.

A file's name does not tell it all: an image may be a part of a file, its data file or its backing
image another one than its header says, the format of its backing image recorded nowhere. QEMU's
block graph does tell, and so the options are made of it: of format nodes, and of the protocol
nodes at the end of their edges; filters between them change no data and are left out.

What qemu-img can be given is narrower than what QEMU takes: options of a backing image count only
if its `file` is a file itself. If that lies in a part of another one, the header of the image above
must name no backing image (`is_nested`). That is so, or the image is refused.
"""

from __future__ import annotations

import posixpath
from collections.abc import Callable
from typing import Any

from qmpblock.errors import UNTOUCHED, UnsupportedError, printable
from qmpblock.graph.jsonname import said_by
from qmpblock.graph.model import FILTERS, BlockGraph, Layer, Node
from qmpblock.graph.openings import part_of_node

__all__ = ["alone", "is_nested", "name_suffices", "opened"]

_LEAVES = ("file", "host_device")
_DEEPEST = 400  # nodes above each other; QEMU's own JSON reader takes 1024


def opened(graph: BlockGraph, name: str, path_of: Callable[[Node], str | None]) -> dict[str, Any]:
    """Return the options that open the image of a format node, with all that lies below it.

    Their keys are those of blockdev-add, without `node-name`; encryption secrets are left out.

    :param path_of: returns the path on this host of the file of a protocol node, if it has one.
    :raise UnsupportedError: qemu-img could not open it so.
    """
    return _options(graph, name, path_of, _DEEPEST)


def _options(
    graph: BlockGraph,
    name: str | None,
    path_of: Callable[[Node], str | None],
    deep: int,
    *,
    storage: bool = False,
) -> dict[str, Any]:
    if name is None or name not in graph.nodes or not deep:
        raise UnsupportedError("how an image is opened cannot be told", standing=UNTOUCHED)
    node = graph.nodes[name]
    if node.is_filter:
        below = node.child(FILTERS[node.driver], "file", "backing", "image")
        return _options(graph, below, path_of, deep - 1, storage=storage)
    if node.driver in _LEAVES:
        path = path_of(node)
        if path is None:
            raise _cannot(node, f"no name that leads to {printable(node.filename)} is known here")
        return {"driver": node.driver, "filename": path}
    if node.child("file") is None:
        return _protocol(node)
    options: dict[str, Any] = {"driver": node.driver}
    try:
        part = part_of_node(node)
    except ValueError:
        raise _cannot(node, "which part of its file it is cannot be read") from None
    if part is not None:
        options |= part.options
    if storage and options == {"driver": "raw"}:  # the whole of what lies below
        return _options(graph, node.child("file"), path_of, deep - 1, storage=True)
    for edge in ("file", "data-file", "backing"):
        below = node.child(edge)
        if below is not None:
            inner = edge != "backing"
            options[edge] = _options(graph, below, path_of, deep - 1, storage=inner)
            if not inner and is_nested(options[edge]) and node.backing_filename is not None:
                raise _cannot(node, "a backing image of it lies in a part of a file")
    if "backing" not in options and node.backing_filename is not None:
        options["backing"] = None
    return options


def _protocol(node: Node) -> dict[str, Any]:
    """Return what QEMU itself says of a node that is neither a file nor on one: NBD, say."""
    if said := said_by(node.filename):
        return said
    if not node.filename or node.filename.startswith("json:"):
        raise _cannot(node, f"its driver is {printable(node.driver)}")
    return {"filename": node.filename}


def _cannot(node: Node, why: str) -> UnsupportedError:
    return UnsupportedError(
        f"{printable(node.filename)} could not be opened again after a crash, to bring home what "
        f"the guest wrote meanwhile: {why}",
        standing=UNTOUCHED,
        remedy="allocate without --full, or open the image by the plain name of its file",
    )


def name_suffices(layer: Layer) -> bool:
    """Whether an image's file name and format suffice to open it as it is open now."""
    if layer.node.filename.startswith("json:"):
        return False
    if layer.data_file is None or layer.data_file.filename == layer.node.data_filename:
        return True
    beside = posixpath.join(posixpath.dirname(layer.file), layer.node.data_filename or "")
    return posixpath.normpath(beside) == posixpath.normpath(layer.data_file.filename)


def is_nested(options: dict[str, Any]) -> bool:
    """Whether an image lies not in a file by itself, but in a part of one, say."""
    file = options.get("file")
    return isinstance(file, dict) and "filename" not in file


def alone(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options that open an image without what lies below it."""
    return options | {"backing": None} if "backing" in options else options
