"""The proof that a name leads back to the file that QEMU has open, before a header records it.

What was planned is looked up as QEMU will look it up: at the plan, at the last moment before the
change, and again before a job of hours is finalized. Somebody may have renamed a file meanwhile,
and QEMU would find the other one at the next start, without a word.

Over TCP, and of other protocols, nothing can be looked up: there names are as good as QEMU's word.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterator

from qmpblock.changes.record import Record
from qmpblock.errors import UNTOUCHED, Error, UnsupportedError, printable
from qmpblock.graph.backingname import check_found
from qmpblock.graph.jsonname import innermost, said_by
from qmpblock.graph.model import BlockGraph, Layer, Node
from qmpblock.graph.openings import storage_of
from qmpblock.graph.places import FileId, Missing, Place, Places, known
from qmpblock.host.openfiles import OpenFiles

__all__ = ["check_made", "check_name", "check_record"]


def check_name(
    files: OpenFiles, places: Places, name: str, recorder: str | None, layer: Layer
) -> None:
    """See that a backing name leads to a layer's files as they are open.

    :param files: of the VM; `places`: where they are.
    :param recorder: the file that records it, from whose directory a relative name counts.
    :raise UnsupportedError: it does not.
    """
    check_found(layer, places)
    for node, path in _named(name, recorder, layer):
        place = known(places, node)
        if place is not None and not files.leads(path, place.file):
            raise UnsupportedError(
                f"the name {printable(name)}, which was to be recorded for @{layer.depth} "
                f"{printable(layer.file)}, does not lead to the file that the VM has open",
                standing=UNTOUCHED,
                remedy="give that file its name back, or see who changes names there",
            )


def check_record(record: Record, graph: BlockGraph, pid: int | None) -> None:
    """See that what a stream or commit makes a VM depend on is there under its name.

    That is the image below the layer that stays, by the name that it will record; of an active
    commit the base, from which the VM is to be started.

    :raise UnsupportedError: it is not.
    """
    link = record.link
    if link is None:
        return  # what comes home from an overlay of ours, say, does so in any case
    for device in graph.devices:
        if device.chain is None or device.qom_path not in record.devices:
            continue
        layers = {layer.node.name: layer for layer in device.chain.layers}
        base, keeper = layers.get(link.base), layers.get(link.keeper)
        if base is None:
            continue
        files = OpenFiles(pid)
        places = files.places(graph.nodes.values())
        by = known(places, storage_of(keeper)) if keeper is not None else None
        name = link.name or (_path(places, base) if record.pivot else "")
        check_name(files, places, name, by.path if by else None, base)


def check_made(place: Place | Missing | None, file: str, made: tuple[int, int] | None) -> None:
    """See that QEMU has opened the file that we made for an overlay, not another.

    :param place: of its node; `made`: device and inode of what was made here, if it was.
    :raise Error: somebody put another one there.
    """
    if isinstance(place, Place) and made is not None and place.file != FileId(*made):
        raise Error(f"somebody else made {printable(file)} another file than ours meanwhile")


def _path(places: Places, layer: Layer) -> str:
    """Return the name by which a layer's file is known; empty if it is not."""
    place = known(places, storage_of(layer))
    return place.path if place is not None else ""


def _named(name: str, recorder: str | None, layer: Layer) -> Iterator[tuple[Node | None, str]]:
    """Yield the nodes whose files a name means, each with an absolute path."""
    if described := said_by(name):
        yield layer.storage, str(innermost(described).get("filename"))
        if "data-file" in described:
            yield layer.data_file, str(innermost(described["data-file"]).get("filename"))
        return
    if name.startswith("/"):
        yield storage_of(layer), name
    elif name and recorder is not None:
        yield storage_of(layer), posixpath.join(posixpath.dirname(recorder), name)
