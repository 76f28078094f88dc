"""By which name a header records the image below: one that leads back to what QEMU has open. Pure.

QEMU looks a relative name up from the directory of whoever records it, by the name by which it
opened that one. So a relative name is right between real directories, and only where the image
that records it has no other name in another directory (`Place.linked`).

Where a file name and a format do not open an image as it is open now (`qmpblock.graph.openings`), a
`json:` text does. What it names is absolute: QEMU looks no name in it up from where the text is
recorded.
"""

from __future__ import annotations

import posixpath
from collections.abc import Mapping
from typing import Any

from qmpblock.errors import UNTOUCHED, UnsupportedError, printable
from qmpblock.graph.jsonname import as_name
from qmpblock.graph.model import Chain, Layer
from qmpblock.graph.openings import description, is_plain, no_name, storage_of
from qmpblock.graph.places import Missing, Place, Places, known

__all__ = ["check_found", "name_of_base", "name_of_frozen"]

_LONGEST = 1023  # bytes of a backing file name (docs/interop/qcow2.txt)


def check_found(layer: Layer, places: Places) -> None:
    """Refuse an image of which it is known that its name leads elsewhere, or nowhere.

    :raise UnsupportedError: it was renamed, replaced or removed.
    """
    for node in (storage_of(layer), layer.data_file):
        place = places.get(node.name) if node is not None else None
        if node is not None and isinstance(place, Missing) and place.certain:
            raise UnsupportedError(
                f"{printable(node.filename)} {place.reason}: who starts the VM by that name finds "
                "other data, or none",
                standing=UNTOUCHED,
                remedy="give the file that the VM has open its name back. If it is removed (a "
                "temporary one of -snapshot, say), copy the disk before the VM ends",
            )


def name_of_frozen(base: Layer, places: Places, directory: str | None, *, relative: bool) -> str:
    """Return the name by which an overlay records the image that it freezes.

    :param directory: of the overlay, without links; None where it is not known.
    :param relative: whether a relative name is wanted, where one can be.
    :raise UnsupportedError: there is no name that leads back to it.
    """
    check_found(base, places)
    if not is_plain(base, places):
        return _text(base, description(base, places))
    place = known(places, storage_of(base))
    file = base.file
    if place is None:
        if "://" in file and not file.startswith("json:"):
            return file
        if not file.startswith("/"):
            raise UnsupportedError(
                f"where {printable(file)} lies cannot be told, so that no overlay could name it",
                standing=UNTOUCHED,
                remedy="start the VM with absolute paths of its images",
            )
        if not relative or directory is None:
            return file
        return _relative(directory, file)
    if not relative or directory is None or place.file.is_device:
        return place.path
    return _relative(directory, place.real)


def name_of_base(chain: Chain, recorder: Layer, base: Layer, places: Places) -> str:
    """Return the name by which a layer that stays records its new backing image.

    It is the name that the layer above `base` records now, so that relative stays relative
    and absolute stays absolute; adapted where the two lie in different directories. Not
    where that is another image's name, because QEMU was told to use this one instead.

    :raise UnsupportedError: there is no name that leads back to it.
    """
    check_found(base, places)
    if not is_plain(base, places):
        return _text(base, description(base, places))
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
        standing=UNTOUCHED,
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
    text = as_name(described)
    if len(text.encode()) > _LONGEST:
        raise no_name(layer, "what describes it is too long for a header")
    return text
