"""By which name a header records the image below: one that leads back to what QEMU has open. Pure.

QEMU looks a relative name up from the directory of whoever records it, by the name by which it
opened that one. So a relative name is right between real directories, and only where the image
that records it has no other name in another directory (`Place.linked`).

A file name and a format do not always open an image as it is open now::

    file    |..........|== part ==|.......|      raw with offset and size
    file    |..........|= qcow2 ==|.......|      an image inside such a part
    file    |= qcow2 =| + data file              named on the command line only

There a `json:` text says it all. What it names is absolute: QEMU looks no name in it up from
where the text is recorded.
"""

from __future__ import annotations

import json
import posixpath
from collections.abc import Mapping
from typing import Any

from qmpblock.errors import UnsupportedError, printable
from qmpblock.graph import BlockGraph, Chain, Layer, Node
from qmpblock.places import Place, Places, known

__all__ = ["name_of_base", "name_of_frozen", "opening", "part_of", "storage_of"]

_UNTOUCHED = "nothing was touched"
_LONGEST = 1023  # bytes of a backing file name (docs/interop/qcow2.txt)


def storage_of(layer: Layer) -> Node:
    """Return the protocol node of a layer: its own where it has no other."""
    return layer.storage or layer.node


def part_of(node: Node) -> tuple[int, int | None] | None:
    """Return offset and size of a raw node that shows only a part of its file; None: it is whole.

    The size is None where the part reaches to the end. QEMU tells it in the `json:` file name
    that it makes of such a node.
    """
    if node.driver != "raw" or not node.filename.startswith("json:"):
        return None
    try:
        options = json.loads(node.filename.removeprefix("json:"))
        offset, size = options.get("offset"), options.get("size")
        if offset is None and size is None:
            return None
        return int(offset or 0), None if size is None else int(size)
    except (ValueError, TypeError, AttributeError):
        return None


def opening(graph: BlockGraph, layer: Layer, places: Places) -> dict[str, Any] | None:
    """Describe how an image is opened; None where its file name and format say it all.

    :raise UnsupportedError: they do not, and a description would not do either.
    """
    below = _below(graph, layer)
    parts = [part for node in below if (part := part_of(node))]
    data = layer.data_file
    by_header = data is None or _by_header(layer, data, places)
    if not parts and by_header:
        return None
    if layer.node.encrypted:
        raise _no_name(layer, "it is encrypted, and not the whole of what its file name opens")
    place, strange = known(places, layer.storage), [one for one in below if one.driver != "raw"]
    if place is None or len(parts) > 1 or strange[1:] or (strange and strange[0] != layer.node):
        raise _no_name(layer, "it is not the whole of what its file name opens")
    assert layer.storage is not None  # it has a place
    inner: dict[str, Any] = {"driver": layer.storage.driver, "filename": place.path}
    if parts and part_of(layer.node) is None:
        inner = {"driver": "raw", **_options(parts[0]), "file": inner}
    found = {"driver": layer.format, **_options(part_of(layer.node)), "file": inner}
    if data is not None and not by_header:
        there = known(places, data)
        if there is None:
            raise _no_name(layer, f"where its data file {printable(data.filename)} is is not known")
        found["data-file"] = {"driver": data.driver, "filename": there.path}
    return found


def _options(part: tuple[int, int | None] | None) -> dict[str, int]:
    if part is None:
        return {}
    offset, size = part
    return {"offset": offset} if size is None else {"offset": offset, "size": size}


def _below(graph: BlockGraph, layer: Layer) -> list[Node]:
    """Return the nodes from a layer's own down to above its protocol node, without filters."""
    found, name = [], layer.node.name
    while layer.storage is not None and name != layer.storage.name:
        node = graph.nodes[name]
        if not node.is_filter:
            found.append(node)
        child = node.child("file", *(edge.name for edge in node.children))
        if child is None:
            break
        name = child
    return found


def _by_header(layer: Layer, data: Node, places: Places) -> bool:
    """Whether the data file is the one that the image's header names."""
    recorded, place = layer.node.data_filename, known(places, data)
    if recorded is None:
        return False
    # Where it is relative it counts from QEMU's directory, as ever: nothing changes for it.
    return recorded == data.filename or (place is not None and recorded in (place.path, place.real))


def name_of_frozen(
    graph: BlockGraph, base: Layer, places: Places, directory: str | None, *, relative: bool
) -> str:
    """Return the name by which an overlay records the image that it freezes.

    :param directory: of the overlay, without links; None where it is not known.
    :param relative: whether a relative name is wanted, where one can be.
    :raise UnsupportedError: there is no name that leads back to it.
    """
    described = opening(graph, base, places)
    if described is not None:
        return _text(base, described)
    place = known(places, storage_of(base))
    file = base.file
    if place is None:
        if "://" in file and not file.startswith("json:"):
            return file
        if not file.startswith("/"):
            raise UnsupportedError(
                f"where {printable(file)} lies cannot be told, so that no overlay could name it",
                standing=_UNTOUCHED,
                remedy="start the VM with absolute paths of its images",
            )
        if not relative or directory is None:
            return file
        return _relative(directory, file)
    if not relative or directory is None or place.file.is_device:
        return place.path
    return _relative(directory, place.real)


def name_of_base(
    graph: BlockGraph, chain: Chain, recorder: Layer, base: Layer, places: Places
) -> str:
    """Return the name by which a layer that stays records its new backing image.

    It is the name that the layer above `base` records now, so that relative stays relative
    and absolute stays absolute; adapted where the two lie in different directories. Not
    where that is another image's name, because QEMU was told to use this one instead.

    :raise UnsupportedError: there is no name that leads back to it.
    """
    described = opening(graph, base, places)
    if described is not None:
        return _text(base, described)
    via = chain.layers[base.depth - 1]
    now = via.node.backing_filename
    if now and now.startswith("json:"):
        now = None  # QEMU's own text, where nobody said better
    to, by = known(places, storage_of(base)), known(places, storage_of(recorder))
    if to is not None:
        return _between(now, known(places, storage_of(via)), by, to)
    return _unseen(now, via, recorder, base)


def _between(now: str | None, via: Place | None, by: Place | None, to: Place) -> str:
    """Name a base whose place is known."""
    if to.file.is_device or not now:
        return to.path
    if now.startswith("/"):
        return now if posixpath.normpath(now) in (to.path, to.real) else to.path
    if via is None or by is None:
        return to.path
    leads = {
        posixpath.normpath(posixpath.join(posixpath.dirname(one), now))
        for one in (via.path, via.real)
    }
    if not leads & {to.path, to.real}:
        return to.path  # it named another image: a name given by hand since
    here = posixpath.dirname(by.real)
    if here == posixpath.dirname(via.real):
        return now
    return to.path if by.linked else _relative(here, to.real)


def _unseen(now: str | None, via: Layer, recorder: Layer, base: Layer) -> str:
    """Name a base that cannot be seen from here."""
    if now:
        if ":" in now.partition("/")[0]:
            return now  # of a protocol: the same from everywhere
        here, there = posixpath.dirname(via.file), posixpath.dirname(recorder.file)
        full = posixpath.normpath(posixpath.join(here, now))
        if _may_be(full, base.file):
            if here == there or now.startswith("/"):
                return now
            if full.startswith("/"):
                return full
    if base.file.startswith("/") or ("://" in base.file and not base.file.startswith("json:")):
        return base.file
    directory = posixpath.dirname(recorder.file)
    if not base.file.startswith("json:") and not recorder.file.startswith(("/", "json:")):
        return posixpath.relpath(base.file, directory or ".")  # both from QEMU's directory
    raise UnsupportedError(
        f"no plain file name is known by which @{recorder.depth} {printable(recorder.file)} could "
        f"record @{base.depth} {printable(base.file)} as its backing file",
        standing=_UNTOUCHED,
    )


def _may_be(path: str, file: str) -> bool:
    """Whether a path may be that of the image that QEMU has open as `file`."""
    if file.startswith("json:"):
        return True  # it has no other name
    if "://" in file:
        return False
    if path.startswith("/") != file.startswith("/"):
        return True  # from which directory a relative one counts is not known
    return path == posixpath.normpath(file)


def _relative(directory: str, file: str) -> str:
    name = posixpath.relpath(file, directory)
    # QEMU takes what stands before a colon for a protocol.
    return f"./{name}" if ":" in name.partition("/")[0] else name


def _text(layer: Layer, described: Mapping[str, Any]) -> str:
    text = "json:" + json.dumps(described)
    if len(text.encode()) > _LONGEST:
        raise _no_name(layer, "what describes it is too long for a header")
    return text


def _no_name(layer: Layer, reason: str) -> UnsupportedError:
    return UnsupportedError(
        f"no name could be recorded that leads back to @{layer.depth} {printable(layer.file)} as "
        f"the VM has it open: {reason}",
        standing=_UNTOUCHED,
        remedy="copy the disk into an image of its own",
    )
