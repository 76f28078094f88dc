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
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from qmpblock.copying.plan import CopyPlan
from qmpblock.graph.places import FileId
from qmpblock.names import left_bitmap, storage_node

if TYPE_CHECKING:
    from qmpblock.qemu.connection import Connection

__all__ = ["CopyTarget", "Left", "LocalTarget"]


@dataclass(frozen=True)
class Left:
    """What a target had not, or had otherwise, when the copy went on from it. All in bytes.

    :ivar missing: how much it is, in whole clusters of 64 KiB.
    :ivar compared: how much was compared to find it.
    :ivar copied: how much was written to it before a job took over, what the guest wrote meanwhile
        included.
    """

    missing: int
    compared: int
    copied: int = 0


class CopyTarget(Protocol):
    """One target, from its making to its end.

    :ivar node: what its node in QEMU is called.
    :ivar source: the view that is copied; empty: the disk itself.
    :ivar resumed: whether it holds something already, from which the copy goes on.
    :ivar told_by: the nodes that tell, asked in this order, where the source may hold anything
        (`qmpblock.copying.held`); none where that is not asked.
    :ivar bitmap: the dirty bitmap, of `source`, of what is to be copied; empty: all is.
    :ivar left: what it had not, or had otherwise, where that was looked for.
    :ivar keeps: whether, should the copy fail, another one can go on from what is there.
    """

    plan: CopyPlan
    node: str
    source: str
    told_by: tuple[str, ...]
    bitmap: str
    resumed: bool
    left: Left | None
    keeps: bool

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

    def bounded(self, patience: float | None = None) -> AbstractContextManager[object]:
        """Have what waits for a server wait for some seconds only, while this lasts."""

    async def flush(self, vm: Connection) -> None:
        """Have all that was written on the server's storage. For a file `finish` sees to that.

        :raise Error: it is not certain that it is there.
        """

    def cut(self) -> None:
        """End the connection to a server, now, so that nothing waits for it. Idempotent."""

    async def finish(self, vm: Connection) -> None:
        """Have it whole, on stable storage, under its name.

        :raise Error: it is not certain that it is.
        """

    async def remove(self) -> str | None:
        """Leave nothing that could be taken for a copy, where that can be done.

        :return: by which name there is what another copy can go on from; None: there is nothing.
        """


class LocalTarget:
    """What is the same for all targets that are reached without a server."""

    node: str
    told_by: tuple[str, ...]
    resumed: bool

    @property
    def nodes(self) -> tuple[str, ...]:
        """Its image, that one's file, and that on which is drawn what is to be copied."""
        own = self.node, storage_node(self.node)
        return (*own, left_bitmap(self.node)) if self.resumed or self.told_by else own

    @property
    def wires(self) -> tuple[tuple[str, str], ...]:
        """None: no server is asked."""
        return ()

    @property
    def broken(self) -> str | None:
        """No server, no reason."""
        return None

    def bounded(self, patience: float | None = None) -> nullcontext[None]:
        """Do nothing: a file is waited for as the guest's own are."""
        return nullcontext()

    async def flush(self, vm: Connection) -> None:
        """Do nothing: `finish` does."""

    def cut(self) -> None:
        """Do nothing: there is no wire."""
