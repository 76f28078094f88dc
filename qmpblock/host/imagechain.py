"""The images of a chain on disk: what each is called, its format, how it is opened.

No image is ever probed for its format, because a guest can forge one: the format is given,
and an image whose backing format is not recorded is refused (design.md, safety rule 3).
"""

from __future__ import annotations

import posixpath
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qmpblock.errors import RequestError, UnsupportedError, printable
from qmpblock.graph.jsonname import innermost, said_by
from qmpblock.host.handed import FORMATS, WITH_BACKING, User, is_local

__all__ = ["Image", "ImageInfo", "backing_of", "blockdev", "format_of"]

_SUFFIXES = {
    ".img": "raw",
    ".luks": "luks",
    ".parallels": "parallels",
    ".qcow": "qcow",
    ".qcow2": "qcow2",
    ".qed": "qed",
    ".raw": "raw",
    ".vdi": "vdi",
    ".vhd": "vpc",
    ".vhdx": "vhdx",
    ".vmdk": "vmdk",
}


@dataclass(frozen=True)
class Image:
    """One image of a chain on disk.

    :ivar file: its path, resolved against the image that names it.
    :ivar format: as given or recorded, never probed.
    :ivar size: virtual size in bytes.
    :ivar opener: whose the image is that names it, with whose rights it is opened; None where it
        was asked for, and is opened with its owner's.
    """

    file: str
    format: str
    size: int
    opener: User | None = None


@dataclass(frozen=True)
class ImageInfo:
    """What `qemu-img info` says of an image; the names as its header has them."""

    size: int
    backing: str
    backing_format: str


def format_of(path: str) -> str:
    """Tell a format from a file name's suffix, which no guest can write.

    :raise RequestError: the suffix tells nothing.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in _SUFFIXES:
        raise RequestError(
            f"the name {printable(path)} does not tell the image's format, and its content is "
            "not asked: a guest can forge it",
            remedy=f"give --format FMT, or use one of the suffixes {' '.join(sorted(_SUFFIXES))}",
        )
    return _SUFFIXES[suffix]


def blockdev(fmt: str, file: str, backing: Sequence[Image] = ()) -> dict[str, Any]:
    """Return blockdev options that open `file`, over exactly `backing`, probing nothing."""
    options: dict[str, Any] = said_by(file) or {
        "driver": fmt,
        "file": {"driver": "file", "filename": file},
    }
    if fmt in WITH_BACKING:
        options["backing"] = (
            blockdev(backing[0].format, backing[0].file, backing[1:]) if backing else None
        )
    return options


def backing_of(overlay: str, info: ImageInfo) -> tuple[str, str]:
    """Return the path and the format of the backing file that an image's header records.

    :raise UnsupportedError: it is no local file, or nothing tells its format.
    """
    path = _beside(overlay, info.backing)
    # QED and QCOW1 headers have no room for it; then the name must tell.
    fmt = info.backing_format or _SUFFIXES.get(Path(path).suffix.lower(), "")
    described = said_by(path)
    if described:
        fmt = str(described.get("driver") or "")
    if not fmt:
        raise UnsupportedError(
            f"{printable(overlay)} does not record the format of its backing file "
            f"{printable(path)}, whose name does not tell it either; it is not probed: "
            "a guest can forge it",
            remedy="record it: qemu-img rebase -u -f FMT -F BACKING_FMT -b "
            f"{printable(info.backing)} {printable(overlay)}",
        )
    if ":" in path.partition("/")[0] and not (described and is_local(described)):
        raise UnsupportedError(
            f"the backing file {printable(path)} is not a local file",
            remedy="map it through the monitor of a VM that has it open",
        )
    if fmt not in FORMATS:
        raise UnsupportedError(
            f"{printable(overlay)} records {printable(fmt)} as the format of its backing "
            f"file {printable(path)}, which is no format of image files",
        )
    return path, fmt


def _beside(path: str, named: str) -> str:
    """Return a backing file's name as it counts from the image that records it."""
    if ":" in named.partition("/")[0]:
        return named.removeprefix("file:")
    described = said_by(path)
    return posixpath.join(
        posixpath.dirname(str(innermost(described)["filename"]) if described else path), named
    )
