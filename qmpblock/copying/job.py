"""What whoever waits for a copy of disks holds: its progress, its speed, its end."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from qmpblock.copying.plan import Point
from qmpblock.errors import CommandError, printable
from qmpblock.qemu.feed import Feed
from qmpblock.qemu.job import Job, Progress
from qmpblock.qemu.jobstate import allows
from qmpblock.qemu.refusals import not_found, tolerate

if TYPE_CHECKING:
    from qmpblock.copying.latency import GuestLatency, Pacer

__all__ = ["CopyJob", "CopyResult", "DiskCopy", "is_worth", "joined"]


@dataclass(frozen=True)
class DiskCopy:
    """One disk that was copied.

    :ivar disk: what people call it.
    :ivar source: the file of its active layer, before.
    :ivar target: the file that holds the copy.
    :ivar format: of the target.
    :ivar size: of the disk, in bytes.
    :ivar copied: bytes that QEMU's job went over, what the guest wrote meanwhile included.
    :ivar compared: where the copy went on from what was there: bytes of that which were compared
        with the disk; None: there was nothing, and all is new.
    :ivar missing: likewise, bytes that it had not, or had otherwise, in blocks of 64 KiB: of the
        rest nothing was copied.
    :ivar allocation: what of it has host space: see `qmpblock.copying.shape`.
    :ivar compressed: whether what it holds is.
    """

    disk: str
    source: str
    target: str
    format: str
    size: int
    copied: int
    compared: int | None = None
    missing: int | None = None
    allocation: str = "thin"
    compressed: bool = False


@dataclass(frozen=True)
class CopyResult:
    """What a copy made.

    :ivar point: of which moment it is: of the `start` or the `end`, or of a `pivot`: then the guest
        is on the targets now.
    :ivar held: seconds for which the guest's I/O was held at most, to bring the disks to one
        instant.
    :ivar attempts: how often that was tried.
    :ivar warnings: what is worth acting on.
    :ivar verified: whether every target was compared, byte for byte, with the point that it is of.
    :ivar latency: how the guest fared, where its latency was held; else None.
    """

    point: Point
    disks: tuple[DiskCopy, ...]
    seconds: float
    held: float
    attempts: int
    warnings: tuple[str, ...]
    verified: bool = False
    latency: GuestLatency | None = None


class CopyJob(Feed[Progress]):
    """The copy of one disk or several. `VM.copy` yields one.

    Async iteration yields the `Progress` of all disks together until the copy has ended; how it
    ended is said on leaving the `async with` that yielded it.

    :ivar progress: as yielded last; None at first.
    :ivar disks: the progress of each disk, by what people call it.
    :ivar warnings: known by now.
    :ivar result: what it made; None before the `async with` has ended.
    :ivar kept: of a copy that failed or was cancelled: by which names there is what another one can
        go on from (`resume`).
    """

    def __init__(self, warnings: tuple[str, ...] = (), pacer: Pacer | None = None) -> None:
        super().__init__()
        self.disks: Mapping[str, Progress] = {}
        self.warnings = warnings
        self.result: CopyResult | None = None
        self.kept: tuple[str, ...] = ()
        self.whole = False  # every target is, under its name
        self.completion = asyncio.Event()  # the end is wanted
        self.done = asyncio.Event()  # all is copied, and of one instant
        self.speed = 0
        self.pacer = pacer
        self._jobs: tuple[Job, ...] = ()
        self._told: dict[str, int] = {}  # what speed each job has
        self._hurries = False
        self._turn = 0.0  # when what is compared next may be read

    # for users

    async def complete(self) -> None:
        """Have the copy end, and wait for that: the point of `end`, and of the pivot, is now.

        Returns also where the copy failed: leaving the `async with` says how. Idempotent.
        """
        self.completion.set()
        while not self.over and not self.done.is_set():
            await self.changed().wait()

    async def set_speed(self, speed: int) -> None:
        """Limit the copy to `speed` bytes a second from now on, of all disks; 0 is no limit.

        :raise CommandError: a job's status does not allow it.
        """
        self.speed = speed
        for job in self._jobs:
            if job.progress is None:
                # Where what is there is compared first, it is still to be made, at that speed.
                await tolerate(not_found, job.set_speed(self.share()))
            elif job.progress.status in ("created", "running", "ready"):
                await job.set_speed(self.share())
            else:
                continue
            self._told[job.id] = self.share()

    @property
    def kept_words(self) -> str:
        """What is to be said of `kept`, for people; empty where nothing is."""
        if not self.kept:
            return ""
        names = ", ".join(map(printable, self.kept))
        return f"what was copied is kept in {names}: the same copy with --resume goes on from it"

    # for what runs the copy

    def share(self) -> int:
        """Return what of the speed is one job's."""
        return -(-self._keeps_to() // max(1, len(self._jobs)))

    def _keeps_to(self) -> int:
        """Return the bytes a second that it keeps to by now; 0 is no limit."""
        if self.pacer is not None and not self._hurries:
            return min(self.speed or self.pacer.limit, self.pacer.limit)
        return self.speed

    async def turn(self, length: int) -> None:
        """Wait until so many bytes may be read, by whoever compares them while no job runs."""
        speed, now = self._keeps_to(), time.monotonic()
        begin = max(now, self._turn)
        if speed:
            self._turn = begin + length / speed
            await asyncio.sleep(begin - now)

    async def keep_to_speed(self) -> None:
        """Have each job keep to its share, as that is now."""
        share = self.share()
        for job in self._jobs:
            if self._told.get(job.id) == share or job.progress is None:
                continue  # or it is only being made, at that speed
            if allows(job.progress.status, "set-speed"):
                # It may have come to its end since; how that was, who follows it is told.
                with contextlib.suppress(CommandError):
                    await job.set_speed(share)
                    self._told[job.id] = share

    async def hurry(self) -> None:
        """Have the jobs end as soon as they may: what the guest would wait for is that."""
        self._hurries = True
        if self.pacer is not None:
            await self.keep_to_speed()

    def runs(self, jobs: tuple[Job, ...]) -> None:
        """Say which jobs do it."""
        self._jobs, self._told, self._hurries = jobs, {}, False

    def publish(self, disk: str, seen: Progress) -> None:
        """Say how far one disk is."""
        self.disks = {**self.disks, disk: seen}
        progress = joined(tuple(self.disks.values()))
        if self.pacer is not None:
            pacer, limit = self.pacer, self._keeps_to()
            progress = replace(progress, latency=pacer.latency, limit=limit, measure=pacer.measure)
        self.show(progress)

    def finished(self) -> None:
        """Say that all is copied, and of one instant."""
        self.done.set()
        self.wake()


def is_worth(seen: Progress) -> bool:
    """Whether what a copy's job has written is worth to be gone on from, should it fail. Pure.

    Not where there is no room for it: kept, it would take that from whoever else is in need of it,
    the guest perhaps.
    """
    return seen.done > 0 and seen.phase != "waiting for room"


#: From what is least far to what is farthest.
_ORDER = ("created", "paused", "running", "standby", "ready", "waiting", "pending", "aborting")


def joined(every: tuple[Progress, ...]) -> Progress:
    """Return the progress of several jobs that do one thing: as far as the last of them. Pure.

    :param every: at least one.
    """
    working = [one for one in every if one.status not in ("concluded", "null")] or list(every)

    def rank(one: Progress) -> tuple[int, float]:
        known = _ORDER.index(one.status) if one.status in _ORDER else len(_ORDER)
        return known, -one.remaining

    last = min(working, key=rank)
    full = [one for one in working if one.phase == "waiting for room"]
    rate = sum(one.rate for one in every)
    done, total = sum(one.done for one in every), sum(one.total for one in every)
    etas = [one.eta for one in working if one.eta is not None]
    return Progress(
        status=last.status,
        phase=full[0].phase if full else last.phase,
        done=done,
        total=total,
        rate=rate,
        eta=max(etas) if etas and last.status == "running" else None,
        idle=max(one.idle for one in working),
        lagging=max(one.lagging for one in working),
        errors=sum(one.errors for one in every),
        error=next((one.error for one in every if one.error is not None), None),
        written=sum(one.written for one in every),
    )
