"""Means: what is done on request, so that a migration of a busy guest ends. Pure.

None of it is done unasked, for the guest feels all of it; and each is said before it takes effect.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from qmpblock.errors import UNTOUCHED, RequestError

__all__ = ["LONGEST_LIMIT", "LONGEST_PAUSE", "MOST_CHANNELS", "MigrationMeans"]

LONGEST_LIMIT = 5.0
"""Seconds that may be allowed for the last of the memory: half of what the guest ever stands."""

LONGEST_PAUSE = 60.0
"""Seconds for which a guest may be paused, where nobody says for how long."""

MOST_CHANNELS = 64
"""Through which memory can go: each takes a thread of either QEMU's, and one of ours."""


@dataclass(frozen=True)
class MigrationMeans:
    """What a migration may do to come to its end.

    :ivar downtime_limit: seconds for which the guest may stand for the last of its memory, 5 at
        most; 0: as the VM's own migration parameters say.
    :ivar auto_converge: have QEMU slow the guest's CPUs down, step by step, while it writes to its
        memory faster than that is sent.
    :ivar write_blocking_after: seconds after which, where a disk is not yet as far as the guest,
        the guest's writes wait until they are at the destination, too; 0: never. Not on every QEMU.
    :ivar multifd: through how many channels the memory goes, each a connection of its own, 64 at
        most; 0: all of it goes through one.
    :ivar pause_after: seconds after which, where it has not come to its end, the guest is paused
        at the source until it has; 0: never.
    :ivar longest_pause: seconds for which it may be paused: it is not before what is left takes no
        longer, and goes on at the source after that.
    """

    downtime_limit: float = 0.0
    auto_converge: bool = False
    write_blocking_after: float = 0.0
    multifd: int = 0
    pause_after: float = 0.0
    longest_pause: float = LONGEST_PAUSE

    @property
    def any(self) -> bool:
        """Whether anything is to be done."""
        return self != MigrationMeans()

    def check(self) -> None:
        """Refuse what cannot be.

        :raise RequestError: it says which; nothing was touched.
        """
        limit = self.downtime_limit
        if limit and not 0.001 <= limit <= LONGEST_LIMIT:
            raise RequestError(
                f"a guest cannot be let stand for {limit:g} s for the last of its memory",
                standing=UNTOUCHED,
                remedy=f"allow 1 ms at least, and {LONGEST_LIMIT:g} s at most: after twice as long "
                "in all it goes on at the source",
            )

        if self.write_blocking_after < 0:
            raise RequestError(
                "the guest's writes cannot be had wait before there is a copy", standing=UNTOUCHED
            )
        if self.pause_after < 0 or self.longest_pause <= 0:
            raise RequestError(
                "a guest is paused after some time, and for some", standing=UNTOUCHED
            )
        if self.longest_pause != LONGEST_PAUSE and not self.pause_after:
            raise RequestError(
                "for how long a guest may be paused is said, and not when it is",
                standing=UNTOUCHED,
                remedy="say after how many seconds (--pause-after)",
            )
        if not 0 <= self.multifd <= MOST_CHANNELS:
            raise RequestError(
                f"memory cannot go through {self.multifd} channels",
                standing=UNTOUCHED,
                remedy=f"give it 1 to {MOST_CHANNELS}",
            )

    def notices(self) -> Iterator[str]:
        """Say what is done as the memory begins to be sent."""
        if self.downtime_limit:
            yield (
                f"the guest may stand for {self.downtime_limit * 1e3:.0f} ms for the last of its "
                "memory (downtime-limit)"
            )
        if self.auto_converge:
            yield (
                "the guest's CPUs are slowed down while it writes to its memory faster than that "
                "is sent (auto-converge)"
            )
        if self.multifd:
            yield f"the memory goes through {_channels(self.multifd)} (multifd)"

    def pause_notice(self) -> str:
        """Say, as the copying begins, when the guest is paused; empty: never."""
        if not self.pause_after:
            return ""
        return (
            f"where it has not gone over in {self.pause_after:g} s the guest is paused until it "
            f"has, as soon as that takes no longer than {self.longest_pause:g} s; after so long it "
            "goes on at the source"
        )


def _channels(number: int) -> str:
    return f"{number} channel" + "s" * (number > 1)
