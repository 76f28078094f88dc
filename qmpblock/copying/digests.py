"""Digests of what a disk holds, block by block: for manifests, and to find what differs later.

Whoever holds the digests of a disk can tell without it where another one differs: a manifest
proves a restored image, and a copy that was broken off goes on where it is not equal yet. A block
that reads as zeros has none, whether they are written or a hole: so digests are equal where
contents are.

As JSON (docs/schema/digests.schema.json), stamped as all that is written for the next controller
(`qmpblock.versioned`)::

    {"format": 1, "version": "...", "algorithm": "blake2b-256", "size": 4194304, "block": 1048576,
     "runs": [{"offset": 1048576, "digests": ["0e57...", "a3f1..."]}]}
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from qmpblock.copying.meter import Meter
from qmpblock.copying.windows import IN_FLIGHT, WINDOW, Window, in_order, windows
from qmpblock.errors import RecordError, RequestError, printable
from qmpblock.ranges import Ranges
from qmpblock.versioned import UnreadableError, stamped, unstamped

if TYPE_CHECKING:
    import numpy.typing as npt

    from qmpblock.nbd import Client
    from qmpblock.qemu.job import Progress

__all__ = ["Digests", "take_digests", "unequal"]

ALGORITHM = "blake2b-256"
_LENGTH = 32  # bytes of a digest
_HEX = re.compile(r"[0-9a-f]{64}")
_SMALLEST, _LARGEST = 4096, 32 << 20  # bytes of a block
_MEMORY = 32 << 20  # bytes of blocks that are read at once


@dataclass(frozen=True)
class Digests:
    """The digests of a disk. Those of the same block size can be compared.

    :ivar size: of the disk, in bytes.
    :ivar block: bytes that a digest is of; a power of two. The last block may be shorter.
    :ivar runs: digests of blocks that follow each other, concatenated, by the number of the first
        such block; ascending, with a block of zeros between two.
    """

    size: int
    block: int
    runs: tuple[tuple[int, bytes], ...]

    def as_json(self) -> dict[str, Any]:
        """Return the document of docs/schema/digests.schema.json."""
        return stamped(
            {
                "algorithm": ALGORITHM,
                "size": self.size,
                "block": self.block,
                "runs": [
                    {
                        "offset": first * self.block,
                        "digests": [
                            run[at : at + _LENGTH].hex() for at in range(0, len(run), _LENGTH)
                        ],
                    }
                    for first, run in self.runs
                ],
            }
        )

    @classmethod
    def from_json(cls, document: object) -> Digests:
        """Read what `as_json` returned, of this version.

        :raise RecordError: it is not that: of a newer version, or damaged.
        """
        try:
            given = unstamped(document)
            if given["algorithm"] != ALGORITHM:
                _wrong(f"their algorithm is {given['algorithm']!r}, and this knows {ALGORITHM}")
            size, block = _number(given["size"]), _number(given["block"])
            _check_block(block)
            runs, end = [], -1
            for run in given["runs"]:
                number, rest = divmod(_number(run["offset"]), block)
                data = b"".join(_digest(one) for one in run["digests"])
                if rest or number <= end or not data:
                    _wrong(f"a run at offset {run['offset']} is not where one can be")
                end = number + len(data) // _LENGTH
                runs.append((number, data))
            if end > -(-size // block):
                _wrong("a run goes on past the end")
        except (KeyError, TypeError, UnreadableError, RequestError) as error:
            why = f"there is no {error}" if isinstance(error, KeyError) else error
            raise RecordError(f"these digests cannot be read: {printable(why)}") from None
        return cls(size, block, tuple(runs))


async def take_digests(
    client: Client,
    *,
    block: int = WINDOW,
    progress: Callable[[Progress], None] | None = None,
) -> Digests:
    """Read an export, and take the digests of its blocks, in threads.

    At most 32 MiB, or one block, are in memory besides the digests, which are 32 bytes a block.
    Cancelling stops at once; the client stays usable.

    :param client: opened with the context `base:allocation`; without it, zeros are read, too.
    :param block: bytes; a power of two from 4096 to 32 MiB.
    :param progress: is told how far it is.
    :raise RequestError: a block cannot be that large, or that small.
    :raise NBDError: the server failed, or a read.
    """
    _check_block(block)
    meter = Meter("reading", client.size, progress)
    runs: list[tuple[int, bytearray]] = []
    done = 0

    async def look(window: Window) -> bytes | None:
        if not window.reads[0]:
            return None
        data = await client.read(window.offset, window.length)
        return await asyncio.to_thread(_digest_of, data)

    most = max(1, min(IN_FLIGHT, _MEMORY // block))
    looks = in_order(windows((client,), 0, client.size, block), look, most)
    async with aclosing(looks):
        async for window, digest in looks:
            done += window.length
            meter.set(done)
            if digest is None:
                continue
            number = window.offset // block
            if not runs or runs[-1][0] + len(runs[-1][1]) // _LENGTH != number:
                runs.append((number, bytearray()))
            runs[-1][1].extend(digest)
    return Digests(client.size, block, tuple((first, bytes(run)) for first, run in runs))


def unequal(first: Digests, second: Digests) -> Ranges:
    """Return where two disks differ, in whole blocks; nothing outside it does.

    What one has past the end of the other counts as different, and so does the block in which
    that one ends, unless it ends with it.

    :raise RequestError: their blocks are of different sizes.
    """
    if first.block != second.block:
        raise RequestError(
            f"digests of blocks of {first.block} bytes cannot be compared with those of "
            f"{second.block}"
        )
    block = first.block
    (one, theirs), (other, others) = _table(first), _table(second)
    places = np.searchsorted(other, one)
    both = places < len(other)
    both[both] = other[places[both]] == one[both]
    differ = (theirs[both] != others[places[both]]).any(axis=1)
    numbers = np.concatenate([one[~both], one[both][differ], np.delete(other, places[both])])
    sizes = sorted((first.size, second.size))
    found = Ranges.from_arrays(numbers * block, numbers * block + block)
    return found.union(Ranges([(sizes[0], sizes[1])])).clip(0, sizes[1])


def _table(digests: Digests) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8]]:
    """Return the numbers of the blocks that have a digest, and the digests, one a row."""
    numbers = [np.arange(first, first + len(run) // _LENGTH) for first, run in digests.runs]
    rows = np.frombuffer(b"".join(run for _, run in digests.runs), np.uint8)
    return np.concatenate([np.empty(0, np.int64), *numbers]), rows.reshape(-1, _LENGTH)


def _digest_of(data: bytearray) -> bytes | None:
    """Return the digest of a block; None where it is all zeros. Others run meanwhile."""
    if data == bytes(len(data)):
        return None
    return hashlib.blake2b(data, digest_size=_LENGTH).digest()


def _check_block(block: int) -> None:
    if not _SMALLEST <= block <= _LARGEST or block & (block - 1):
        raise RequestError(
            f"a block of {block} bytes is no power of two from {_SMALLEST} to {_LARGEST}"
        )


def _number(value: object) -> int:
    if type(value) is not int or not 0 <= value < 1 << 63:
        _wrong(f"{value!r} is no number of bytes")
    return value


def _digest(value: object) -> bytes:
    if not isinstance(value, str) or not _HEX.fullmatch(value):
        _wrong(f"{value!r} is no digest")
    return bytes.fromhex(value)


def _wrong(why: str) -> NoReturn:
    raise UnreadableError(why)
