"""Host space for raw data: by fallocate(2) on the file that the guest writes to.

It reserves blocks and touches no byte of content or size: neither guest nor QEMU sees it, and
it cannot collide with a write (F4). For raw images, LUKS images (whose payload
begins at an offset), and qcow2 images whose external data file is raw.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qmpblock.errors import UNTOUCHED, Error, GraphError, UnsupportedError, printable
from qmpblock.graph.model import Layer
from qmpblock.graph.openings import in_part
from qmpblock.host import imagefiles
from qmpblock.host.borrowed import in_the_name_of, open_as_it_has
from qmpblock.host.fallocate import UNSUPPORTED, keep_size
from qmpblock.host.handed import User
from qmpblock.host.space import check_reservable

if TYPE_CHECKING:
    from qmpblock.mapping import MappedDisk
    from qmpblock.speed import Speed

__all__ = [
    "host_file",
    "raw_file",
    "reserve_ranges",
]

_SMALLEST = 1 << 20  # bytes of a call at a low speed
_PIECE = 64 << 20  # bytes of one call; it may take a while on some file systems


async def raw_file(disk: MappedDisk) -> tuple[str, int] | None:
    """Return the file that holds the active layer's data as it is, and where in it byte 0 lies.

    None where the format does not store it so.

    :raise UnsupportedError: it does, but the file cannot be reached from here.
    """
    active = disk.chain.active
    if active.format == "raw":
        start = 0
    elif active.format == "luks":
        start = (await _format_specific(disk, active)).get("payload-offset", 0)
        if not isinstance(start, int) or not 0 <= start < 1 << 62:
            raise GraphError(
                f"{printable(active.file)} has its payload at {printable(start)}, by QEMU's words",
                standing=UNTOUCHED,
            )
    elif (
        active.data_file is not None
        and (await _format_specific(disk, active)).get("data-file-raw") is True
    ):
        active = replace(active, storage=active.data_file)
        start = 0
    else:
        return None
    return host_file(disk, active), start


def host_file(disk: MappedDisk, layer: Layer) -> str:
    """Return the path on this host of the file that a layer is stored in.

    :raise UnsupportedError: it is a block device or a part of a file, or cannot be reached from
        here.
    """
    storage = layer.storage
    if in_part(layer):
        raise UnsupportedError(
            f"{printable(layer.file)} is a file of which the image is only a part: space cannot be "
            "reserved there",
            standing=UNTOUCHED,
        )
    if storage is not None and storage.driver == "host_device":
        raise UnsupportedError(
            f"{printable(storage.filename)} is a block device: its space is its own already, and "
            "a thin volume below it is not ours to fill",
            standing=UNTOUCHED,
        )
    pid = disk.vm.monitor.peer_pid
    file = imagefiles.local_path(pid, layer)
    if file is None:
        raise UnsupportedError(
            f"{printable(layer.file)}, where space would be reserved, "
            f"{imagefiles.why_not_local(pid, layer)}",
            standing=UNTOUCHED,
            remedy="run qmpblock on the VM's host, by a UNIX monitor, as the VM's user or root; "
            "the image must be there under the name by which the VM has it",
        )
    return file


async def _format_specific(disk: MappedDisk, layer: Layer) -> dict[str, Any]:
    nodes = await disk.vm.monitor.execute("query-named-block-nodes", {"flat": True})
    for node in nodes:
        if node["node-name"] == layer.node.name:
            data = node["image"].get("format-specific", {}).get("data", {})
            return dict(data) if isinstance(data, dict) else {}
    return {}


async def reserve_ranges(
    file: str,
    pid: int,
    ranges: Iterable[tuple[int, int]],
    *,
    speed: Speed,
    tell: Callable[[int, int], None] | None = None,
    grows: bool = False,
) -> int:
    """Reserve several (start, stop) of a file, in their order; return what the file takes more.

    In bytes. Cancelling leaves what is reserved by then.

    :param pid: of the process that has the file open for writing, in whose user's name it is done.
    :param tell: is called with bytes done and bytes to do.
    :param grows: whether the file grows at its end, so that they may lie beyond it.
    :raise RequestError: that much cannot be (`qmpblock.host.space`); nothing was reserved.
    :raise UnsupportedError: the file system cannot, or that process does not have it open so.
    :raise DisconnectedError: that process has ended.
    :raise Error: there is no room, say; what was reserved by then stays.
    """
    wanted = list(ranges)
    total, done = sum(stop - start for start, stop in wanted), 0
    user = User.of_process(pid).uid
    try:
        fd = await asyncio.to_thread(open_as_it_has, pid, file)
    except OSError as error:
        raise _cannot(file, error, done) from None
    try:
        check_reservable(file, pid, wanted, fd=fd, grows=grows)
        before = os.fstat(fd).st_blocks
        for start, stop in wanted:
            at = start
            while at < stop:
                piece = min(speed.piece(_PIECE, _SMALLEST), stop - at)
                await speed.wait(piece)
                try:
                    await asyncio.to_thread(_reserve, user, fd, at, piece)
                except OSError as error:
                    raise _cannot(file, error, done) from None
                at += piece
                done += piece
                if tell is not None:
                    tell(done, total)
        return max(0, os.fstat(fd).st_blocks - before) * 512
    finally:
        os.close(fd)


def _reserve(user: int, fd: int, offset: int, length: int) -> None:
    with in_the_name_of(user):
        keep_size(fd, offset, length)


def _cannot(file: str, error: OSError, done: int) -> Error:
    if error.errno in UNSUPPORTED:
        return UnsupportedError(
            f"the file system of {printable(file)} cannot reserve space (fallocate)",
            standing="nothing was changed",
        )
    return Error(
        f"cannot reserve space in {printable(file)}: {error.strerror}",
        standing=f"the first {done} bytes of the range are reserved; contents are as they were",
        remedy="make room, then run it again",
    )
