"""What a copy wants of a target: a file, a block device, or an export of an NBD server.

::

    make      in QEMU nothing is there yet
    open      QEMU has it, as `node`, for a job
    flush     the job has ended well; QEMU is about to close it
    finish    QEMU has closed it: it is whole
    remove    instead of `finish`: it is not

What may wait for a server (a command that drains, while QEMU has it open) stands in `bounded`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Protocol

from qmpblock.copying.plan import CopyPlan
from qmpblock.graph.places import FileId
from qmpblock.names import storage_node

if TYPE_CHECKING:
    from qmpblock.qemu.connection import Connection

__all__ = ["CopyTarget", "LocalTarget", "for_zeros"]


class CopyTarget(Protocol):
    """One target, from its making to its end.

    :ivar node: what its node in QEMU is called.
    :ivar source: the view that is copied; empty: the disk itself.
    """

    plan: CopyPlan
    node: str
    source: str

    @property
    def path(self) -> str:
        """By which QEMU opens it, for people and for a journal."""

    @property
    def nodes(self) -> tuple[str, ...]:
        """All its nodes in QEMU, in the order in which they can be removed."""

    @property
    def wires(self) -> tuple[tuple[str, str], ...]:
        """Those that reach a server, each with the socket of its relay: see `Record.wires`."""

    @property
    def broken(self) -> str | None:
        """Why the server cannot be reached any more; None where it can, or there is none."""

    async def make(self, vm: Connection, record: Callable[[FileId], None]) -> None:
        """Make it, empty, where it is to be made.

        :param record: is called with what it will be, before it has a name.
        :raise Error: it cannot be made.
        """

    async def open(self, vm: Connection) -> None:
        """Have QEMU open it.

        :raise Error: it cannot, or it is not as large as the disk; what QEMU has of it is for
            whoever undoes the copy.
        """

    def bounded(self) -> AbstractContextManager[object]:
        """Have what waits for a server wait for some seconds only, while this lasts."""

    async def flush(self, vm: Connection) -> None:
        """Have all that was written on the server's storage. For a file `finish` sees to that.

        :raise Error: it is not certain that it is there.
        """

    def cut(self) -> None:
        """End the connection to a server, now, so that nothing waits for it. Idempotent."""

    async def finish(self) -> None:
        """Have it whole, on stable storage, under its name.

        :raise Error: it is not certain that it is.
        """

    async def remove(self) -> None:
        """Leave nothing that could be taken for a copy, where that can be done."""


def for_zeros(source: str) -> dict[str, str]:
    """Return the options of a target's node by which what holds nothing takes nothing.

    :param source: the view that is copied. Of one QEMU does not tell which zeros are none that
        somebody wrote; empty: the disk itself, of which it does.
    """
    return {"discard": "unmap", "detect-zeroes": "unmap" if source else "off"}


class LocalTarget:
    """What is the same for all targets that are reached without a server."""

    node: str

    @property
    def nodes(self) -> tuple[str, ...]:
        """Its image, and that one's file."""
        return self.node, storage_node(self.node)

    @property
    def wires(self) -> tuple[tuple[str, str], ...]:
        """None: no server is asked."""
        return ()

    @property
    def broken(self) -> str | None:
        """No server, no reason."""
        return None

    def bounded(self) -> nullcontext[None]:
        """Do nothing: a file is waited for as the guest's own are."""
        return nullcontext()

    async def flush(self, vm: Connection) -> None:
        """Do nothing: `finish` does."""

    def cut(self) -> None:
        """Do nothing: there is no wire."""
