"""Whether two disks hold the same: closed images, and points in time that a VM exports.

Where qemu-img can open both it does the work, at a tenth of the processor time; where only it found
a difference, or they are to be counted, or one is an export or somebody else's, they are read by
NBD (`qmpblock.copying.comparing`).
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from qmpblock.copying.comparing import Comparison, compare
from qmpblock.copying.meter import Meter
from qmpblock.copying.windows import CONTEXT, WINDOW
from qmpblock.errors import UNTOUCHED, Error, RequestError, ToolError, UnsupportedError
from qmpblock.host.closedimage import ClosedImage, closed_image
from qmpblock.host.handed import HandedFiles
from qmpblock.host.qemuimgcompare import QemuImgCompare
from qmpblock.host.qemunbd import QemuNbd
from qmpblock.host.toolwords import lacks_key
from qmpblock.host.writers import check_unchanged, check_unwritten
from qmpblock.ranges import Ranges

if TYPE_CHECKING:
    from qmpblock.nbd import Client
    from qmpblock.qemu.job import Progress

__all__ = ["Longer", "NBDExport", "Verification", "opened", "verify", "verify_images"]

Longer = Literal["no", "zeros", "any"]
"""What one that is longer than the other may hold past the other's end."""

_LONGER = ("no", "zeros", "any")


@dataclass(frozen=True)
class NBDExport:
    """An export, such as that of a point in time, to which a connection is made.

    Never of a disk in an iothread of a QEMU before 10.0, which aborts when a client goes away (K1):
    of that give the client of `qmpblock.export.exports`.

    :ivar address: where its server listens, as for `qmpblock.nbd.Client.connect`.
    :ivar name: its export name.
    """

    address: str
    name: str = ""


@dataclass(frozen=True)
class Verification:
    """Whether two disks hold the same. All in bytes, but `seconds`.

    :ivar equal: whether they do, of the sizes that were asked for.
    :ivar sizes: of the first and of the second.
    :ivar first_difference: where the first byte is that differs; None where none does, or where
        the sizes alone say that they differ.
    :ivar differing: how many bytes differ; None where that was not counted.
    :ivar unequal: where these are, in whole grains of 64 KiB or more; None as above.
    :ivar compared: how much was compared, from the first byte on.
    """

    equal: bool
    sizes: tuple[int, int]
    first_difference: int | None
    differing: int | None
    unequal: Ranges | None
    compared: int
    seconds: float


async def verify_images(
    first: str | os.PathLike[str],
    second: str | os.PathLike[str],
    *,
    format: str | None = None,  # noqa: A002 - the command's word
    second_format: str | None = None,
    longer: Longer = "no",
    all: bool = False,  # noqa: A002 - the command's word
    progress: Callable[[Progress], None] | None = None,
    stall: float = 60.0,
) -> Verification:
    """Compare what guests would read from two closed images, each with all that lies below it.

    Holes and written zeros are equal. The images may be of any formats. Meanwhile QEMU's locks are
    on them, but on raw ones: no VM can be started from them. Cancelling ends at once what was
    started.

    :param format: of the first; None: as the suffix of its name tells. It is never probed, nor is
        that of a backing image.
    :param second_format: of the second.
    :param longer: whether one may be longer than the other: `no`; `zeros`, if it reads as zeros
        there; `any`, whatever is there, as on a block device that is larger than what was copied.
    :param all: go on after the first difference, and count them.
    :param progress: is told how far it is.
    :param stall: seconds without any movement that count as a failure.
    :raise InUseError: a running VM, or another process, has one of them open for writing.
    :raise UnsupportedError: one is encrypted; or see `qmpblock.closed_image`.
    :raise RequestError: nothing tells a format.
    :raise Error: one was written to meanwhile.
    :raise ToolError: a tool of QEMU's is not here, or cannot read one of them.
    :raise StalledError: nothing moved for the stall limit.
    :raise NBDError: one of them could not be read.
    """
    # Before a tool is to open them, which of most formats says it in its own way.
    await asyncio.to_thread(check_unwritten, [str(first), str(second)])
    images = (
        await closed_image(first, format=format, stall=stall),
        await closed_image(second, format=second_format, stall=stall),
    )
    return await verify(*images, longer=longer, all=all, progress=progress, stall=stall)


async def verify(
    first: ClosedImage | NBDExport | Client,
    second: ClosedImage | NBDExport | Client,
    *,
    longer: Longer = "no",
    all: bool = False,  # noqa: A002 - the command's word
    progress: Callable[[Progress], None] | None = None,
    stall: float = 60.0,
    turn: Callable[[int], Awaitable[None]] | None = None,
) -> Verification:
    """Compare two sources; see `verify_images`, of which this is the core.

    :param first: a client stays open, and should have asked for `base:allocation`. Nothing but
        reads and questions is sent to it, so it may be one under custody (K1).
    :param second: the same.
    :param turn: of one that is a client: as of `compare`.
    """
    if longer not in _LONGER:
        raise RequestError(f"{longer!r} is none of {', '.join(_LONGER)}", standing=UNTOUCHED)
    began = time.monotonic()
    images = [one for one in (first, second) if isinstance(one, ClosedImage)]
    files = [layer.file for image in images for layer in image.chain]
    before = await asyncio.to_thread(check_unwritten, files)
    try:
        if len(images) == 2 and not all and longer != "any" and _one_owner(*images):
            found = await _by_qemu_img(images[0], images[1], longer, progress, stall)
        else:
            found = await _by_nbd(first, second, longer, all, progress, stall, turn)
    except ToolError as error:
        if not lacks_key(error.stderr):
            raise
        raise UnsupportedError(
            f"one of the images is encrypted, and its key is not here: {error.message}",
            standing=UNTOUCHED,
            remedy="two of format luks can be compared as they are stored: --format raw "
            "--second-format raw",
        ) from None
    check_unchanged(before)
    sizes, comparison = found
    if comparison is None:
        return Verification(False, sizes, None, None, None, 0, time.monotonic() - began)
    return Verification(
        comparison.equal,
        sizes,
        comparison.first_difference,
        comparison.differing if all or comparison.equal else None,
        comparison.unequal if all or comparison.equal else None,
        comparison.compared,
        time.monotonic() - began,
    )


@asynccontextmanager
async def opened(
    source: ClosedImage | NBDExport | Client, *, stall: float = 60.0
) -> AsyncIterator[Client]:
    """Open what can be compared or read: an image by a qemu-nbd that ends with this.

    :raise Error: see `verify_images`.
    """
    if isinstance(source, ClosedImage):
        async with QemuNbd(stall=stall).serving(source.options) as client:
            yield client
    elif isinstance(source, NBDExport):
        from qmpblock.nbd import Client

        async with await Client.connect(
            source.address, export=source.name, contexts=[CONTEXT], stall=stall
        ) as client:
            yield client
    else:
        yield source


_Found = tuple[tuple[int, int], Comparison | None]


async def _by_nbd(
    first: ClosedImage | NBDExport | Client,
    second: ClosedImage | NBDExport | Client,
    longer: Longer,
    all: bool,  # noqa: A002
    progress: Callable[[Progress], None] | None,
    stall: float,
    turn: Callable[[int], Awaitable[None]] | None,
) -> _Found:
    async with AsyncExitStack() as stack:
        one = await stack.enter_async_context(opened(first, stall=stall))
        other = await stack.enter_async_context(opened(second, stall=stall))
        sizes = one.size, other.size
        if longer == "no" and one.size != other.size:
            return sizes, None
        length = min(sizes) if longer == "any" else max(sizes)
        found = await compare(one, other, length=length, all=all, progress=progress, turn=turn)
        return sizes, found


async def _by_qemu_img(
    first: ClosedImage,
    second: ClosedImage,
    longer: Longer,
    progress: Callable[[Progress], None] | None,
    stall: float,
) -> _Found:
    sizes, began = (first.size, second.size), time.monotonic()
    if longer == "no" and first.size != second.size:
        return sizes, None
    length = max(sizes)
    meter = Meter("comparing", length, progress)
    place = await QemuImgCompare(stall=stall).compare(
        first.options, second.options, progress=lambda part: meter.set(int(part * length))
    )
    seconds = time.monotonic() - began
    if place is None:
        return sizes, Comparison(None, 0, Ranges(), length, 0, seconds)
    # Which byte it is qemu-img does not say.
    start = place - place % WINDOW
    async with opened(first, stall=stall) as one, opened(second, stall=stall) as other:
        found = await compare(one, other, offset=start, length=min(WINDOW, length - start))
    if found.equal:
        raise Error(
            f"qemu-img found a difference at offset {place}, and another look did not",
            remedy="somebody writes to one of the images, or the storage does not read what was "
            "written: find out which before relying on either",
        )
    return sizes, found


def _one_owner(first: ClosedImage, second: ClosedImage) -> bool:
    """Whether one process may open both: each is opened with its owner's rights."""
    if os.geteuid() != 0:
        return True
    owners = []
    for image in (first, second):
        with HandedFiles() as files:
            files.image(image.options)
            owners.append(files.owner)
    return owners[0] == owners[1]
