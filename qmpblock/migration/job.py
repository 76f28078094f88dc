"""What whoever waits for a migration holds: its progress, its phase, its result."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Literal

from qmpblock.migration.course import Course, MemoryPass, MirrorCourse, PhaseTime
from qmpblock.migration.diskterms import Allocation, Layers
from qmpblock.migration.states import Phase
from qmpblock.qemu.feed import Feed
from qmpblock.qemu.job import Progress

__all__ = [
    "MemoryPass",
    "MigratedBitmap",
    "MigratedDisk",
    "MigrationJob",
    "MigrationResult",
    "MirrorCourse",
    "Notice",
    "PhaseTime",
]


@dataclass(frozen=True)
class Notice:
    """What was said before it took effect.

    :ivar at: seconds from the beginning of the migration.
    :ivar text: for people.
    """

    at: float
    text: str


@dataclass(frozen=True)
class MigratedDisk:
    """One disk that went along.

    :ivar disk: what people call it at the source.
    :ivar file: of the active layer at the source; `target`: at the destination.
    :ivar size: in bytes.
    :ivar copied: bytes that the mirror went over, what the guest wrote meanwhile included.
    :ivar course: how far it was, and when.
    :ivar layers: which of its layers were copied: all, or the active one alone.
    :ivar allocation: what has host space there, as it was asked for.
    """

    disk: str
    file: str
    target: str
    size: int
    copied: int
    course: MirrorCourse
    layers: Layers = "all"
    allocation: Allocation = "thin"


@dataclass(frozen=True)
class MigratedBitmap:
    """One dirty bitmap that went along.

    :ivar disk: what people call its disk at the source.
    :ivar node: of the disk's, that it is of at the destination.
    :ivar persistent: whether the image keeps it.
    :ivar count: bytes that it marked when the guest stood.
    """

    disk: str
    name: str
    node: str
    persistent: bool
    count: int


@dataclass(frozen=True)
class MigrationResult:
    """What a migration came to: the guest is at the destination.

    :ivar disks: that were copied; empty where they are shared.
    :ivar seconds: in all; `downtime`: for which the guest stood, from QEMU's word that it had
        stopped at the source to that it went on at the destination, by their hosts' clocks; 0
        where they did not say.
    :ivar qemu_downtime: the same as the source's QEMU tells it, which knows nothing of what comes
        after it has sent all; None where it did not say.
    :ivar longest_stall: the same by this process's own clock, from when it heard the one word to
        when it heard the other: what the guest felt is no longer; 0 where they did not say.
    :ivar stopped: when it heard them, in seconds from the beginning; `resumed`.
    :ivar transferred: bytes of memory and devices' state, as QEMU counts them.
    :ivar bitmaps: dirty bitmaps that went along.
    :ivar phases: what each took, in their order.
    :ivar passes: over the memory, as far as they were seen.
    :ivar source: what became of the source's QEMU: `postmigrate`, or `ended`.
    :ivar destination: in which run state the guest is there: `running`; `paused`, for somebody else
        stopped it on the way; `suspended`, as it was; or as what it stopped by itself, in QEMU's
        word (`io-error`, `guest-panicked`, ...).
    :ivar warnings: what is worth acting on.
    :ivar notices: what was done on request for it to end, and when that was said.
    :ivar paused: seconds of that standstill for which it was paused, on request, until the source
        held it.
    """

    disks: tuple[MigratedDisk, ...]
    seconds: float
    downtime: float
    qemu_downtime: float | None
    longest_stall: float
    stopped: float | None
    resumed: float | None
    transferred: int
    bitmaps: tuple[MigratedBitmap, ...]
    phases: tuple[PhaseTime, ...]
    passes: tuple[MemoryPass, ...]
    source: Literal["postmigrate", "ended"]
    warnings: tuple[str, ...]
    notices: tuple[Notice, ...] = ()
    paused: float = 0.0
    destination: str = "running"


class MigrationJob(Feed[Progress]):
    """A migration. `qmpblock.migrate` yields one.

    Async iteration yields the `Progress` until it has ended: of all disks together, then of the
    memory. Its `status` is the phase; how it ended is said on leaving the `async with`.

    :ivar progress: as yielded last; None at first.
    :ivar phase: in which it is.
    :ivar warnings: known by now.
    :ivar notices: what was done by now, on request, for it to end; each before it takes effect.
    :ivar result: what it came to; None before the guest is at the destination and all is
        cleaned up.
    :ivar over: whether it has ended.
    """

    def __init__(self, warnings: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.phase = Phase.CHECKED
        self.warnings = warnings
        self.notices: tuple[Notice, ...] = ()
        self.result: MigrationResult | None = None
        self.course = Course(time.monotonic())  # for what runs the migration

    @property
    def gone_over(self) -> bool:
        """Whether the guest may run at the destination only: there is no way back."""
        return self.phase is Phase.HANDED

    # for what runs the migration

    def enter(self, phase: Phase) -> None:
        """Say that a phase begins."""
        self.phase = phase
        self.course.enter(time.monotonic(), phase)
        self.wake()

    def say(self, text: str) -> None:
        """Say what is about to be done on request."""
        self.notices = (*self.notices, Notice(self.course.since(time.monotonic()), text))
        if self.progress is None:
            self.wake()
        else:
            self.show(replace(self.progress))  # for whoever iterates to look
