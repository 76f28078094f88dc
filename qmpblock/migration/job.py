"""What whoever waits for a migration holds: its progress, its phase, its result."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal

from qmpblock.migration.states import Phase
from qmpblock.qemu.feed import Feed
from qmpblock.qemu.job import Progress

__all__ = ["MigratedDisk", "MigrationJob", "MigrationResult", "PhaseTime"]


@dataclass(frozen=True)
class PhaseTime:
    """How long one phase took.

    :ivar phase: its name.
    :ivar seconds: until the next one began, or until all was cleaned up.
    """

    phase: str
    seconds: float


@dataclass(frozen=True)
class MigratedDisk:
    """One disk that went along.

    :ivar disk: what people call it at the source.
    :ivar file: of the active layer at the source; `target`: at the destination.
    :ivar size: in bytes.
    :ivar copied: bytes that the mirror went over, what the guest wrote meanwhile included.
    """

    disk: str
    file: str
    target: str
    size: int
    copied: int


@dataclass(frozen=True)
class MigrationResult:
    """What a migration came to: the guest runs at the destination.

    :ivar disks: that were copied; empty where they are shared.
    :ivar seconds: in all; `downtime`: for which the guest stood, from QEMU's word that it had
        stopped at the source to that it went on at the destination; 0 where they did not say.
    :ivar transferred: bytes of memory and devices' state, as QEMU counts them.
    :ivar phases: how long each took, in their order.
    :ivar source: what became of the source's QEMU: `postmigrate`, or `ended`.
    :ivar warnings: what is worth acting on.
    """

    disks: tuple[MigratedDisk, ...]
    seconds: float
    downtime: float
    transferred: int
    phases: tuple[PhaseTime, ...]
    source: Literal["postmigrate", "ended"]
    warnings: tuple[str, ...]


class MigrationJob(Feed[Progress]):
    """A migration. `qmpblock.migrate` yields one.

    Async iteration yields the `Progress` until it has ended: of all disks together, then of the
    memory. Its `status` is the phase; how it ended is said on leaving the `async with`.

    :ivar progress: as yielded last; None at first.
    :ivar phase: in which it is.
    :ivar warnings: known by now.
    :ivar result: what it came to; None before the guest runs at the destination and all is
        cleaned up.
    :ivar over: whether it has ended.
    """

    def __init__(self, warnings: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.phase = Phase.CHECKED
        self.warnings = warnings
        self.result: MigrationResult | None = None
        self._began = [(Phase.CHECKED, time.monotonic())]

    @property
    def gone_over(self) -> bool:
        """Whether the guest may run at the destination only: there is no way back."""
        return self.phase is Phase.HANDED

    # for what runs the migration

    def enter(self, phase: Phase) -> None:
        """Say that a phase begins."""
        self.phase = phase
        self._began.append((phase, time.monotonic()))
        self.wake()

    def phases(self) -> tuple[PhaseTime, ...]:
        """Return how long each phase took, the last one until now."""
        ends = [began for _, began in self._began[1:]] + [time.monotonic()]
        return tuple(
            PhaseTime(phase.value, end - began)
            for (phase, began), end in zip(self._began, ends, strict=True)
        )
