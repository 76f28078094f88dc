"""Transport: what carries the commands of a `Monitor` to a QEMU, and its events back.

A monitor is the same whichever way it is reached: turns, limits, subscriptions and errors are
`Monitor`'s. What differs is here: a socket of QEMU's own (`qmpblock.qemu.qmpsocket`), or the
monitor that a manager holds, and lends, or one that it shares by turns (`qmpblock.qemu.turns`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from qmpblock.host.forward import Forward
    from qmpblock.qemu.lender import Lender

__all__ = ["Event", "LostError", "Transport"]

Event = Mapping[str, Any]


class LostError(Exception):
    """The way to QEMU was lost: what was under way is unknown. `Monitor` says so, in its words.

    :ivar why: as far as it is known; printable.
    """

    def __init__(self, why: str = "") -> None:
        super().__init__(why)
        self.why = why


class Transport(Protocol):
    """A way to the monitor of one QEMU.

    It hands each event to the function that it was made with, and how many bytes it has, in the
    order in which QEMU sent them; and calls another one when it is lost for good.

    :ivar version: of QEMU, and `package`; known when it is open.
    """

    version: tuple[int, int, int]
    package: str

    @property
    def by_turns(self) -> bool:
        """Whether others have it in between: events are missed, and a command may wait for them."""

    @property
    def can_pass_fds(self) -> bool:
        """Whether file descriptors can be handed to QEMU."""

    @property
    def peer_pid(self) -> int | None:
        """QEMU's process, on this host; None: not known."""

    @property
    def forward(self) -> Forward | None:
        """The ssh by which it goes to another host; None where it does not."""

    @property
    def lender(self) -> Lender | None:
        """The manager that lends it, and changes chains itself; None: nobody, or none that can."""

    @property
    def ended(self) -> str:
        """Why it is lost for good, in words, where that is known; else empty."""

    async def open(self, timeout: float, stall: float) -> None:
        """Reach the monitor. A failure or a cancellation leaves nothing open.

        :param timeout: seconds for the connection, and again for the greeting.
        :param stall: seconds that closing may take.
        :raise Error: as of `Monitor.connect`.
        """

    async def close(self, stall: float) -> None:
        """Leave it. Idempotent; never raises for one that is lost already."""

    async def execute(
        self,
        command: str,
        arguments: Mapping[str, object] | None,
        *,
        out_of_band: bool = False,
    ) -> Any:
        """Run a command and return what QEMU returned, unchecked.

        Cancelling leaves the outcome unknown.

        :raise CommandError: QEMU refused it.
        :raise LostError: the outcome is unknown.
        """

    def send_fd(self, fd: int) -> None:
        """Have the next command take a duplicate of a file descriptor along.

        :raise LostError: the way is lost.
        """

    async def disks_called(self) -> Mapping[str, str]:
        """Return the ids of the guest's disks by the names of whoever lends the monitor, if any.

        :raise LostError: the way is lost.
        """

    def keep_turn(self, kept: bool) -> None:
        """Have what is run from now on be one turn, or no longer, where it is had by turns."""

    def keep_unlogged(self, unlogged: bool) -> None:
        """Keep what is sent and read from now on out of this process's logs, or no longer."""
