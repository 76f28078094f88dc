"""The bytes of a range, out of whatever holds them: an image, one layer of it, an NBD export."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from qmpblock.errors import RangeError, RequestError
from qmpblock.testing.images import BuiltDisk, BuiltImage, Tools, secret_arguments

__all__ = ["read_area"]

_SECTOR = 512  # what QEMU's raw driver, which cuts the range out, counts in


async def read_area(
    source: BuiltDisk | BuiltImage | os.PathLike[str] | str,
    offset: int,
    length: int,
    *,
    format: str | None = None,  # noqa: A002 - QEMU's word
    layer_only: bool = False,
    tools: Tools | None = None,
) -> bytes:
    """Return `length` bytes from `offset` of what a guest would see there.

    `qemu-img convert` reads them, by a full description: nothing is probed. A copy of the
    range lies in the temporary directory meanwhile. An image must be closed.

    :param source: what the harness built (its active layer, or any of `chain()`), a path, or the
        URI of an NBD export (`nbd://...`, `nbd+unix:///NAME?socket=PATH`).
    :param format: of a path: `raw`, `qcow2`, ... Of the others it is known.
    :param layer_only: only what this layer itself holds; what it does not is zeros. Else a path
        is opened with the backing image that it records.
    :param tools: default: those of the tested QEMU.
    :raise RangeError: the range is not inside the source, or negative.
    :raise RequestError: a path without its format, or a layer of an NBD export.
    :raise ToolError: qemu-img failed.
    """
    if offset < 0 or length < 0:
        raise RangeError(f"offset {offset} and length {length} must not be negative")
    described, secrets = _describe(source, format, layer_only=layer_only)
    first = offset - offset % _SECTOR
    size = -(-(offset + length - first) // _SECTOR) * _SECTOR
    if not length:
        return b""
    cut = {"driver": "raw", "offset": first, "size": size, **described}
    tools = tools or Tools.of()
    with tempfile.TemporaryDirectory(prefix="area-") as scratch:
        path = Path(scratch) / "area"
        arguments = (*secret_arguments(secrets), "json:" + json.dumps(cut))
        await tools.run(tools.img, "convert", "-O", "raw", *arguments, str(path))
        with path.open("rb") as file:
            file.seek(offset - first)
            data = file.read(length)
    if len(data) != length:
        raise RangeError(f"got {len(data)} of {length} bytes from {offset}")
    return data


def _describe(
    source: BuiltDisk | BuiltImage | os.PathLike[str] | str,
    format: str | None,  # noqa: A002 - as above
    *,
    layer_only: bool,
) -> tuple[dict[str, Any], Mapping[str, str]]:
    """Return the child that a raw node cuts its range out of, and the secrets that it needs."""
    if isinstance(source, BuiltDisk):
        source = source.active
    if isinstance(source, BuiltImage):
        described = source.describe(discard=None)
        if layer_only and "backing" in described:
            described["backing"] = None
        return {"file": described}, source.secrets()
    text = os.fspath(source)
    if text.startswith("nbd") and ":" in text.partition("/")[0]:
        if layer_only:
            raise RequestError("an NBD export shows no layers; read the image, or export a layer")
        return {"file": _nbd(text)}, {}
    if format is None:
        raise RequestError(
            f"the format of {text} is not known, and none is probed",
            remedy='say it, as in read_area(path, 0, 512, format="qcow2")',
        )
    opened: dict[str, Any] = {
        "driver": format,
        "file": {"driver": "file", "filename": str(Path(text).absolute())},
    }
    if layer_only and format != "raw":
        opened["backing"] = None
    return {"file": opened}, {}


def _nbd(uri: str) -> dict[str, Any]:
    """Return the blockdev description of an NBD URI (its specification: NBD's doc/uri.md).

    :raise RequestError: it is of TLS, or names no server.
    """
    parts = urlsplit(uri)
    export = unquote(parts.path.removeprefix("/"))
    server: dict[str, str] | None = None
    if parts.scheme == "nbd+unix":
        paths = parse_qs(parts.query).get("socket", [])
        server = {"type": "unix", "path": paths[0]} if len(paths) == 1 else None
    elif parts.scheme == "nbd" and parts.hostname:
        server = {"type": "inet", "host": parts.hostname, "port": str(parts.port or 10809)}
    if server is None:
        raise RequestError(
            f"{uri} is not nbd://HOST[:PORT]/NAME or nbd+unix:///NAME?socket=PATH; "
            "TLS is not for tests of areas"
        )
    return {"driver": "nbd", "export": export, "server": server}
