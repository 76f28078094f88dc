"""What a tiny guest's stress run must have left on its disk: the pure, host-side verifier.

The guest (`firmware/stress.c`) numbers its writes from 1. Write q fills block
``mix(q ^ seed) & (blocks - 1)`` of its area; each 512-byte sector of it is a *stamp*, whose
every byte follows from (seed, sector number on the disk, q). Writes are issued in order, and
a block never has two in flight, so the whole expected content follows from few numbers.

One sector, in little-endian 32-bit words::

      0       1      2..3       4        5 .. 125          126       127
    magic | seed | sector | sequence | filler (121) | sequence | ~sequence

    filler[i] = mix(sector_low ^ mix(sector_high ^ mix(sequence ^ mix(seed)))) + i * STEP

A sector that was never written holds the background (zeros, or what the test put there).

Three questions can be asked of the bytes of an area:

- `check_acknowledged`: a live, closed or crashed disk. Nothing that was acknowledged may be
  lost; what was issued beyond that may be there or not.
- `check_point_in_time`: a snapshot or backup taken while the run went on. There is one n so
  that the area is what writes 1..n leave, but for at most `queue_depth` that were in flight;
  and it lies within the `Bounds` that the guest knows of, so that neither an empty image nor
  one of another time is right.
- `check_one_instant`: the same of several disks whose runs keep step: one n for all.

Offsets and lengths are bytes, except sector numbers, which count 512 bytes.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from qmpblock.errors import RangeError

__all__ = [
    "Acknowledged",
    "BlockFault",
    "Bounds",
    "OneInstant",
    "PointInTime",
    "StressSpec",
    "Taken",
    "check_acknowledged",
    "check_one_instant",
    "check_point_in_time",
    "checksum",
    "expected_content",
    "stamped",
]

SECTOR = 512
MAGIC = 0x32534754  # "TGS2"
FILLER_STEP = 0x9E3779B1
FILLER = slice(5, 126)
MAX_BLOCK_SIZE = 64 * 1024
MAX_BLOCKS = 1 << 21
MAX_QUEUE_DEPTH = 62
MAX_SEQUENCE = (1 << 31) - 1
MAX_DISKS = 16
WINDOW = 4096
"""A write is issued only while fewer than this are beyond the oldest unacknowledged one."""
CHUNK_SECTORS = 16384
"""Sectors looked at together: 8 MiB, which keeps the scratch arrays small."""

Words = npt.NDArray[np.uint32]
Bytes = bytes | bytearray | memoryview | npt.NDArray[np.uint8]

BACKGROUND = 0
"""The sequence number of a sector that was never written."""
TORN = -1
"""Stands for the sequence number where a sector is neither a stamp nor background."""


@dataclass(frozen=True, kw_only=True)
class StressSpec:
    """One stress run of a tiny guest.

    :param disk: the guest's number of the disk.
    :param offset: where the area begins on the disk, bytes, a multiple of 512.
    :param blocks: how many blocks the area has: a power of two, at most 2 Mi.
    :param block_size: bytes of a block: a multiple of 512, at most 64 KiB.
    :param queue_depth: requests in flight, 1 to 62 (flushes apart).
    :param total: stop after so many writes; 0: when stopped.
    :param seed: 32 bits that make this run's blocks and stamps its own.
    :param flush_every: a flush after each so many writes; 0: never.
    :param rate: requests a second at most; 0: as fast as it goes.
    :param read_percent: of the requests, reads that verify what they read (0 to 99).
    :param group: the guest's numbers of the disks whose runs keep step, this one's among them
        (`TinyGuest.stress_in_step`); empty: it runs for itself.
    :raises RangeError: a value that the guest would refuse.
    """

    disk: int = 0
    offset: int = 0
    blocks: int = 4096
    block_size: int = 4096
    queue_depth: int = 16
    total: int = 0
    seed: int = 1
    flush_every: int = 0
    rate: int = 0
    read_percent: int = 0
    group: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        def need(ok: bool, what: str) -> None:
            if not ok:
                raise RangeError(f"a stress run cannot have {what}")

        need(self.disk >= 0, f"disk {self.disk}")
        need(
            self.offset >= 0 and self.offset % SECTOR == 0,
            f"offset {self.offset}: it must be a multiple of {SECTOR}, from 0",
        )
        need(
            0 < self.blocks <= MAX_BLOCKS and self.blocks & (self.blocks - 1) == 0,
            f"{self.blocks} blocks: it must be a power of two, at most {MAX_BLOCKS}",
        )
        need(
            0 < self.block_size <= MAX_BLOCK_SIZE and self.block_size % SECTOR == 0,
            f"blocks of {self.block_size} bytes: they must be multiples of {SECTOR}, "
            f"at most {MAX_BLOCK_SIZE}",
        )
        need(0 < self.queue_depth <= MAX_QUEUE_DEPTH, f"queue depth {self.queue_depth}")
        need(0 <= self.total <= MAX_SEQUENCE, f"{self.total} writes")
        need(0 <= self.seed < 1 << 32, f"seed {self.seed}")
        need(0 <= self.flush_every < 1 << 32, f"a flush every {self.flush_every} writes")
        need(0 <= self.rate <= 1_000_000, f"a rate of {self.rate}")
        need(0 <= self.read_percent <= 99, f"{self.read_percent} percent of reads")
        members = set(self.group)
        need(
            not members or (self.disk in members and members <= set(range(MAX_DISKS))),
            f"the group {self.group}: it has disk {self.disk} itself and numbers below {MAX_DISKS}",
        )

    @property
    def length(self) -> int:
        """Bytes of the whole area."""
        return self.blocks * self.block_size

    @property
    def sectors_per_block(self) -> int:
        """512-byte sectors of one block."""
        return self.block_size // SECTOR


@dataclass(frozen=True)
class Bounds:
    """Between what and what a point in time lies, as the guest that wrote knows it.

    `TinyGuest.bounds` asks the guest for both.

    :param acked: the last write that was acknowledged, with all before it, before the point
        began to be taken: none of them may be missing. At least 1: of a disk to which nothing
        had been written every empty image would be a point in time.
    :param issued: the last write that was issued when the point had been taken: none beyond it
        can be there.
    :raises RangeError: they are not 0 < acked <= issued.
    """

    acked: int
    issued: int

    def __post_init__(self) -> None:
        if self.acked == 0:
            raise RangeError(
                "nothing was acknowledged before the point in time began, so that an empty image "
                "would pass as well",
                remedy="let the guest write first: wait until its progress says acked > 0",
            )
        if not 0 < self.acked <= self.issued <= MAX_SEQUENCE:
            raise RangeError(
                f"acked {self.acked} and issued {self.issued} must be in order, from 1"
            )


@dataclass(frozen=True, order=True)
class BlockFault:
    """One block that is not what it must be.

    :param block: its number in the area.
    :param offset: where on the disk, bytes: the first wrong sector.
    :param found: the sequence number found there; 0: background; None: no intact stamp.
    :param expected: the sequence number that should be there; 0: background.
    """

    block: int
    offset: int
    found: int | None
    expected: int

    def __str__(self) -> str:
        found = "no intact stamp" if self.found is None else f"write {self.found}"
        return (
            f"block {self.block} (byte {self.offset} of the disk): "
            f"found {found}, expected write {self.expected}"
        )


@dataclass(frozen=True)
class _Faults:
    lost: tuple[BlockFault, ...]
    torn: tuple[BlockFault, ...]
    future: tuple[BlockFault, ...]

    @property
    def ok(self) -> bool:
        """Nothing is wrong."""
        return not (self.lost or self.torn or self.future)

    def __str__(self) -> str:
        if self.ok:
            return "every block is what it must be"
        lines = [f"{len(self.lost)} lost, {len(self.torn)} torn, {len(self.future)} future"]
        for name, faults in (("lost", self.lost), ("torn", self.torn), ("future", self.future)):
            lines += [f"  {name}: {fault}" for fault in faults[:5]]
        return "\n".join(lines)


@dataclass(frozen=True)
class Acknowledged(_Faults):
    """What `check_acknowledged` found; `str()` of it is the assertion message.

    :param lost: blocks with an older write than the last acknowledged one.
    :param torn: blocks with a sector that is no intact stamp of this run and place.
    :param future: blocks with a write that was never issued.
    :param ahead: how many blocks hold a write issued but not known as acknowledged (legal).
    """

    ahead: int


@dataclass(frozen=True)
class PointInTime(_Faults):
    """What `check_point_in_time` found; `str()` of it is the assertion message.

    :param lost: blocks whose missing write cannot have been in flight at that point: it was
        acknowledged before, or they are older than the write before it, or too many.
    :param torn: blocks with a sector that is no intact stamp, or of several writes.
    :param future: blocks with a write that was issued after the point had been taken.
    :param sequence: the newest write found, which is n (0: none).
    :param in_flight: how many writes up to n are not there (legal up to the queue depth).
    """

    sequence: int
    in_flight: int


def mix(values: Words) -> Words:
    """Hash each element as the guest does (`mix` in `firmware/stamp.c`)."""
    x = values * np.uint32(0x9E3779B1)
    x ^= x >> np.uint32(15)
    x *= np.uint32(0x85EBCA77)
    x ^= x >> np.uint32(13)
    return x


def checksum(data: Bytes) -> int:
    """Return the checksum that `TinyGuest.read` returns for these bytes (CRC-32, as zlib's)."""
    return zlib.crc32(np.frombuffer(data, np.uint8).data)


def _stamps(seed: int, sectors: npt.NDArray[np.uint64], sequences: Words) -> Words:
    """Make the stamps of (sector, sequence) pairs; an array of shape (pairs, 128)."""
    low = (sectors & np.uint64(0xFFFFFFFF)).astype(np.uint32)
    high = (sectors >> np.uint64(32)).astype(np.uint32)
    key = mix(low ^ mix(high ^ mix(sequences ^ mix(np.array([seed], np.uint32)))))
    words = np.empty((len(sectors), SECTOR // 4), np.uint32)
    words[:, 0] = MAGIC
    words[:, 1] = seed
    words[:, 2] = low
    words[:, 3] = high
    words[:, 4] = sequences
    steps = np.arange(FILLER.stop - FILLER.start, dtype=np.uint32) * np.uint32(FILLER_STEP)
    words[:, FILLER] = key[:, np.newaxis] + steps
    words[:, 126] = sequences
    words[:, 127] = ~sequences
    return words


def stamped(offset: int, length: int, *, sequence: int, seed: int) -> bytes:
    """Return the bytes that `TinyGuest.write` puts at `offset` of a disk.

    :raises RangeError: an offset or length that is no multiple of 512.
    """
    if offset < 0 or length < 0 or offset % SECTOR or length % SECTOR:
        raise RangeError(f"offset {offset} and length {length} must be multiples of {SECTOR}")
    first, count = offset // SECTOR, length // SECTOR
    sectors = np.arange(first, first + count, dtype=np.uint64)
    return _stamps(seed, sectors, np.full(count, sequence, np.uint32)).astype("<u4").tobytes()


def block_of(spec: StressSpec, first: int, last: int) -> Words:
    """Return the blocks that writes first..last go to, in order (empty when last < first)."""
    sequences = np.arange(first, last + 1, dtype=np.uint32)
    return mix(sequences ^ np.uint32(spec.seed)) & np.uint32(spec.blocks - 1)


def _last_writes(spec: StressSpec, n: int) -> npt.NDArray[np.int64]:
    """Return, of each block, the last write of 1..n to it; 0: none."""
    last = np.zeros(spec.blocks, np.int64)
    if n:
        # with repeated indices numpy keeps the last value assigned, which is the newest write
        last[block_of(spec, 1, n)] = np.arange(1, n + 1)
    return last


def expected_content(spec: StressSpec, n: int, *, background: int = 0) -> bytes:
    """Return the bytes of the area after writes 1..n and no other.

    :param background: the byte that never-written blocks are filled with.
    """
    sequences = np.repeat(_last_writes(spec, n), spec.sectors_per_block).astype(np.uint32)
    first = spec.offset // SECTOR
    sectors = np.arange(first, first + len(sequences), dtype=np.uint64)
    words = _stamps(spec.seed, sectors, sequences)
    words[sequences == 0] = background * 0x01010101
    return words.astype("<u4", copy=False).tobytes()


def _chunks(count: int) -> Iterator[slice]:
    for start in range(0, count, CHUNK_SECTORS):
        yield slice(start, min(start + CHUNK_SECTORS, count))


def _scan(data: Bytes, spec: StressSpec, background: int) -> npt.NDArray[np.int64]:
    """Return the sequence number of each sector, as shape (blocks, sectors of a block).

    `BACKGROUND` where the sector is all background, `TORN` where it is neither that nor an
    intact stamp of this run at this place.

    :raises RangeError: `data` is not as long as the area.
    """
    flat = np.frombuffer(data, dtype="<u4")
    if flat.nbytes != spec.length:
        raise RangeError(f"got {flat.nbytes} bytes of an area of {spec.length}")
    words = flat.reshape(-1, SECTOR // 4)
    found = np.empty(len(words), np.int64)
    first = spec.offset // SECTOR
    for chunk in _chunks(len(words)):
        part = words[chunk]
        sequences = part[:, 4].astype(np.uint32)
        sectors = np.arange(first + chunk.start, first + chunk.stop, dtype=np.uint64)
        intact = (part == _stamps(spec.seed, sectors, sequences)).all(axis=1)
        intact &= (sequences > 0) & (sequences <= MAX_SEQUENCE)
        empty = (part == np.uint32(background * 0x01010101)).all(axis=1)
        found[chunk] = np.where(intact, sequences, np.where(empty, BACKGROUND, TORN))
    return found.reshape(spec.blocks, spec.sectors_per_block)


def _faults(
    spec: StressSpec,
    found: npt.NDArray[np.int64],
    wrong: npt.NDArray[np.bool_],
    expected: npt.NDArray[np.int64],
) -> tuple[BlockFault, ...]:
    """One fault for each block with a wrong sector, naming the first; arguments as `_scan`'s."""
    faults = []
    for block in np.flatnonzero(wrong.any(axis=1)).tolist():
        sector = int(wrong[block].argmax())
        sequence = int(found[block, sector])
        faults.append(
            BlockFault(
                block=block,
                offset=spec.offset + block * spec.block_size + sector * SECTOR,
                found=None if sequence == TORN else sequence,
                expected=int(expected[block]),
            )
        )
    return tuple(faults)


def check_acknowledged(
    data: Bytes, spec: StressSpec, acked: int, issued: int, *, background: int = 0
) -> Acknowledged:
    """Whether a live, closed or crashed disk holds all that was acknowledged, and no more.

    :param data: the whole area, `spec.length` bytes.
    :param acked: the bound below which nothing may be missing: the guest's `acked` after an
        orderly end or a migration, its `flushed` after a kill -9.
    :param issued: the last write that the guest can have issued. After a kill -9 that is more
        than it last reported: give the largest number it can have reached.
    :param background: the byte that never-written blocks are filled with.
    :raises RangeError: `data` has another length, or the numbers are not 0 <= acked <= issued.
    """
    if not 0 <= acked <= issued <= MAX_SEQUENCE:
        raise RangeError(f"acked {acked} and issued {issued} must be in order, from 0")
    found = _scan(data, spec, background)
    expected = _last_writes(spec, acked)
    want = expected[:, np.newaxis]
    torn = found == TORN
    future = found > issued
    lost = ~torn & (found < want)
    # Newer than expected and not too new: it must be a write that goes to this very block.
    ahead = (found > want) & ~future
    blocks, sectors = np.nonzero(ahead)
    sequences = found[blocks, sectors].astype(np.uint32)
    goes_to = mix(sequences ^ np.uint32(spec.seed)) & np.uint32(spec.blocks - 1)
    alien = goes_to != blocks.astype(np.uint32)
    torn[blocks[alien], sectors[alien]] = True
    # Between the two, 1..acked cannot be newer than the last of 1..acked: so it is > acked.
    return Acknowledged(
        lost=_faults(spec, found, lost, expected),
        torn=_faults(spec, found, torn, expected),
        future=_faults(spec, found, future, expected),
        ahead=int(ahead.any(axis=1).sum()),
    )


def check_point_in_time(
    data: Bytes,
    spec: StressSpec,
    bounds: Bounds,
    *,
    queue_depth: int | None = None,
    background: int = 0,
) -> PointInTime:
    """Whether an image is the area at one point in time of the run, within bounds.

    Let n be the newest write found. Every block must hold its last write of 1..n, or, if that
    one was in flight at the point, the write before it; at most `queue_depth` may be so, and
    none of 1..`bounds.acked`. (Completion is in any order, so a missing write may be much
    older than n.) n may not be beyond `bounds.issued`.

    :param data: the whole area, `spec.length` bytes.
    :param bounds: where the point lies; `TinyGuest.bounds` asks the guest.
    :param queue_depth: writes that can have been in flight; default: the run's.
    :param background: the byte that never-written blocks are filled with.
    :raises RangeError: `data` has another length.
    :raises TypeError: `bounds` are none.
    """
    if not isinstance(bounds, Bounds):
        raise TypeError(
            f"bounds must be Bounds(acked=..., issued=...) or come from TinyGuest.bounds, "
            f"not {bounds!r}: without them an empty or a stale image would pass"
        )
    depth = spec.queue_depth if queue_depth is None else queue_depth
    sectors = _scan(data, spec, background)
    torn = (sectors == TORN) | (sectors != sectors[:, :1])
    whole = ~torn.any(axis=1)
    found = np.where(whole, sectors[:, 0], BACKGROUND)
    future = whole & (found > bounds.issued)
    n = int(found[~future].max(initial=0))
    last = _last_writes(spec, n)
    # The write before the last one: the last one again, with each block's last write left out.
    before = np.zeros(spec.blocks, np.int64)
    if n:
        blocks = block_of(spec, 1, n)
        sequences = np.arange(1, n + 1)
        older = sequences != last[blocks]
        before[blocks[older]] = sequences[older]
    # In an image that is too old for the bounds n itself is: what was acknowledged says more.
    needed = _last_writes(spec, bounds.acked)
    expected = np.maximum(last, needed)
    missing = whole & ~future & (found != expected)
    too_old = missing & ((found != before) | (expected <= max(n - WINDOW, bounds.acked)))
    in_flight = missing & ~too_old
    lost = too_old | (in_flight if in_flight.sum() > depth else False)

    def faults(wrong: npt.NDArray[np.bool_]) -> tuple[BlockFault, ...]:
        return _faults(
            spec, sectors, np.broadcast_to(wrong[:, np.newaxis], sectors.shape), expected
        )

    return PointInTime(
        lost=faults(lost),
        torn=_faults(spec, sectors, torn, expected),
        future=faults(future),
        sequence=n,
        in_flight=int(in_flight.sum()),
    )


class Taken(NamedTuple):
    """What was taken of one disk: the arguments of `check_point_in_time`."""

    data: Bytes
    spec: StressSpec
    bounds: Bounds


@dataclass(frozen=True)
class OneInstant:
    """What `check_one_instant` found; `str()` of it is the assertion message.

    :param sequence: the newest write found on any of the disks.
    :param disks: what was found of each, at that instant.
    """

    sequence: int
    disks: Mapping[str, PointInTime]

    @property
    def ok(self) -> bool:
        """All disks are as they were at one instant."""
        return all(disk.ok for disk in self.disks.values())

    def __str__(self) -> str:
        lines = [f"the newest write of all disks is {self.sequence}"]
        lines += [f"{name} (newest {disk.sequence}): {disk}" for name, disk in self.disks.items()]
        return "\n".join(lines)


def check_one_instant(disks: Mapping[str, Taken], *, background: int = 0) -> OneInstant:
    """Whether images of several disks, whose runs keep step, are of one and the same instant.

    Let n be the newest write found on any of them. Runs in step are never more than the queue
    depth ahead of what each of them has acknowledged, so each disk must be at a point in time
    (`check_point_in_time`) that has all writes up to n less that. Copies that were taken one
    after the other have not, if the guest did more than so many writes in between.

    :param disks: by the name that messages are to give it.
    :param background: the byte that never-written blocks are filled with.
    :raises RangeError: it is one disk only, or their runs do not keep step.
    """
    groups = {(taken.spec.group, taken.spec.queue_depth) for taken in disks.values()}
    if len(disks) < 2 or len(groups) != 1 or () in {group for group, _ in groups}:
        raise RangeError(
            "one instant can only be told of several disks whose runs keep step",
            remedy="start them by TinyGuest.stress_in_step, and give the specs that it returns",
        )
    found = {
        name: check_point_in_time(*taken, background=background) for name, taken in disks.items()
    }
    n = max(disk.sequence for disk in found.values())
    for name, (data, spec, bounds) in disks.items():
        least = n - spec.queue_depth
        if least > bounds.acked:
            closer = Bounds(least, max(least, bounds.issued))
            found[name] = check_point_in_time(data, spec, closer, background=background)
    return OneInstant(n, found)
