"""What whoever waits for a backup holds: its progress, its speed, its end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qmpblock.qemu.feed import Feed
from qmpblock.qemu.job import Progress

if TYPE_CHECKING:
    from qmpblock.backups.decision import Decision
    from qmpblock.backups.point import Point
    from qmpblock.copying.job import CopyJob

__all__ = ["BackupJob", "BackupResult"]


@dataclass(frozen=True)
class BackupResult:
    """What a backup made.

    :ivar directory: in which it is.
    :ivar point: what its point file says.
    :ivar held: seconds for which the guest's I/O was held at most.
    :ivar verified: whether every image was compared, byte for byte, with the instant of which it
        is.
    :ivar warnings: what is worth acting on.
    """

    directory: str
    point: Point
    seconds: float
    held: float
    verified: bool
    warnings: tuple[str, ...]


class BackupJob(Feed[Progress]):
    """A backup of disks. `VM.backup` yields one.

    Async iteration yields its `Progress`, of all disks together, until it has ended; how it ended
    is said on leaving the `async with` that yielded it.

    :ivar progress: as yielded last; None at first.
    :ivar decisions: what the backup of each disk is to be, and why.
    :ivar warnings: known by now.
    :ivar result: what it made; None before the `async with` has ended. Also where that was
        cancelled once it was made.
    """

    def __init__(self) -> None:
        super().__init__()
        self.decisions: tuple[Decision, ...] = ()
        self.warnings: tuple[str, ...] = ()
        self.result: BackupResult | None = None
        self.copying: CopyJob | None = None

    async def set_speed(self, speed: int) -> None:
        """Limit it to `speed` bytes a second from now on, of all disks; 0 is no limit.

        What is copied already, and is only read to take its digest, is not limited.

        :raise CommandError: a job's status does not allow it.
        """
        if self.copying is not None and not self.copying.over:
            await self.copying.set_speed(speed)
