"""A target that is an export of an NBD server, which QEMU reaches over a wire of ours.

Its size is the disk's to the byte: of a larger export the job sees the beginning. Nothing is made
there, and nothing can be removed: what a copy that failed has written stays, as no copy.

The one connection of the wire is all that the server ever sees: many serve one client, and end.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from qmpblock.cancellation import undisturbed
from qmpblock.chains.headers import Header, make
from qmpblock.copying.copytarget import Left
from qmpblock.copying.plan import CopyPlan
from qmpblock.copying.relay import End
from qmpblock.copying.target import Credentials
from qmpblock.copying.wire import HOLD, Wire, wire_socket
from qmpblock.errors import (
    Error,
    JobError,
    NBDDisconnectedError,
    NBDRequestError,
    RequestError,
    StalledError,
    printable,
)
from qmpblock.export.session import Request, exports
from qmpblock.graph.places import FileId
from qmpblock.names import left_bitmap, run_of, wire_node
from qmpblock.qemu.job import Job
from qmpblock.qemu.qemuio import qemu_io

if TYPE_CHECKING:
    from qmpblock.copying.copytarget import CopyTarget
    from qmpblock.qemu.connection import Connection

__all__ = ["WireTarget", "bounded", "cut_on_error"]

_PAGE = 4096  # bytes; any server takes whole ones


@dataclass
class WireTarget:
    """One target, from the laying of its wire to its end. See `CopyTarget`.

    :ivar number: of the copy's targets.
    :ivar credentials: for TLS.
    """

    plan: CopyPlan
    node: str
    number: int
    credentials: Credentials | None = None
    source: str = ""
    told_by: tuple[str, ...] = ()
    bitmap: str = ""
    resumed: bool = False
    left: Left | None = None
    keeps: bool = False
    _wire: Wire | None = None
    _laid: AsyncExitStack = field(default_factory=AsyncExitStack)

    @property
    def path(self) -> str:
        """Its URI."""
        return self.plan.file

    @property
    def nodes(self) -> tuple[str, ...]:
        """The one that the job sees, the wire, and that on which is drawn what is left."""
        own = self.node, wire_node(run_of(self.node), self.number)
        return (*own, left_bitmap(self.node)) if self.resumed else own

    @property
    def wires(self) -> tuple[tuple[str, str], ...]:
        """Its wire."""
        return ((self.nodes[1], wire_socket(run_of(self.node), self.number)),)

    @property
    def broken(self) -> str | None:
        """Why the server cannot be reached any more."""
        end = None if self._wire is None else self._wire.relay.ended
        return None if end is None else end.value

    async def make(self, vm: Connection, record: Callable[[FileId], None]) -> None:
        """Do nothing: it is there."""

    async def open(self, vm: Connection) -> None:
        """Lay the wire, and have QEMU see as much of the export as the disk has.

        :raise RequestError: the export is smaller than the disk.
        :raise NBDConnectError: no server answers, or QEMU and it do not agree.
        """
        server, size = self.plan.server, self.plan.size
        assert server is not None  # it is what this is of
        run = run_of(self.node)
        settings = self.plan.shape.while_copying(of_view=bool(self.source))
        laying = Wire.open(
            vm,
            server,
            run=run,
            number=self.number,
            credentials=self.credentials,
            discard=settings.discard,
        )
        wire = await self._laid.enter_async_context(laying)
        self._wire = wire
        there = (await vm.graph()).nodes[wire.node].size
        fmt = self.plan.format
        wanted = size if fmt == "raw" else self.plan.shape.room(fmt, size)
        if there < wanted:
            tables = "" if fmt == "raw" else f", which takes {wanted} in a qcow2 image"
            raise RequestError(
                f"{printable(server)} has {there} bytes, and {self.plan.device.name} "
                f"{size}{tables}",
                standing="nothing was written there, and the disk was not touched",
                remedy=f"have the server export at least {wanted} bytes; of more, the rest is left "
                "as it is",
            )
        options: dict[str, Any] = {"driver": fmt, "node-name": self.node, "file": wire.node}
        if fmt == "raw":
            options["size"] = size
        else:
            await self._make_image(vm, wire.node)
            if self.plan.secret is not None:
                options["encrypt"] = {"format": "luks", "key-secret": self.plan.secret}
        with self.bounded():
            await vm.monitor.execute("blockdev-add", options | settings.options)

    async def _make_image(self, vm: Connection, wire: str) -> None:
        """Write the tables of an empty image there, through an export of ours of the wire.

        Not by a job of QEMU's, which would make it abort (K11).
        """
        plan = self.plan
        header = Header(plan.format, plan.size, cluster=plan.shape.unit, key_secret=plan.secret)
        contents = await make(vm, header)
        request = Request(wire, (), writable=True)
        async with AsyncExitStack() as stack:
            exporting = exports(vm.monitor, None, [request], access=vm.nbd, stall=vm.stall)
            with self.bounded():
                [client] = await stack.enter_async_context(exporting)
            try:
                for at, data in contents.whole():
                    await client.write(at, data.ljust(-(-len(data) // _PAGE) * _PAGE, b"\0"))
                await client.flush()
            except BaseException:
                self.cut()  # or ending the export would wait for what the server was asked
                raise
            with self.bounded():
                await stack.aclose()

    def bounded(self, patience: float | None = None) -> AbstractContextManager[object]:
        """Give the server so many seconds for each answer, while this lasts; None: `HOLD`.

        No more than the wire's own, which may be less than that.
        """
        if self._wire is None:
            return contextlib.nullcontext()
        most = self._wire.hold
        return self._wire.relay.within(most if patience is None else min(patience, most))

    async def flush(self, vm: Connection) -> None:
        """Have the server flush: when QEMU closes a node, nobody hears that that failed.

        :raise NBDDisconnectedError: the server was not there any more, or failed.
        :raise StalledError: it did not answer.
        """
        assert self._wire is not None  # open() went before
        node = self._wire.node if self.plan.format == "raw" else self.node  # with its tables
        with self.bounded():
            said = await qemu_io(vm.monitor, node, "flush")
        if said or self.broken:
            raise _no_more(self, printable(said) or "before it had all on its storage")

    def cut(self) -> None:
        """Cut the wire."""
        if self._wire is not None:
            self._wire.cut()

    async def finish(self, vm: Connection) -> None:
        """Close the relay; QEMU has left it.

        :raise StalledError: the server did not answer at the end.
        """
        await self._laid.aclose()

    async def remove(self) -> str | None:
        """Close the relay; what was written stays with the server."""
        self.cut()
        with contextlib.suppress(Error):  # said by whoever undoes the copy
            await self._laid.aclose()
        return self.path if self.keeps and self.plan.can_be_resumed else None


@contextlib.contextmanager
def bounded(targets: Sequence[CopyTarget], patience: float | None = None) -> Iterator[None]:
    """Have nothing wait long for any target's server, while this lasts.

    :param patience: seconds; None: `wire.HOLD`.
    """
    with contextlib.ExitStack() as stack:
        for target in targets:
            stack.enter_context(target.bounded(patience))
        yield


@asynccontextmanager
async def cut_on_error(
    vm: Connection, jobs: Sequence[str], targets: Sequence[CopyTarget]
) -> AsyncIterator[None]:
    """Where the body fails or is cancelled, have nothing wait for a server any more.

    :raise StalledError: a server did not answer, by which the body failed.
    :raise NBDDisconnectedError: it closed the connection, by which the body failed.
    """
    try:
        yield
    except BaseException as error:
        broken = next((target for target in targets if target.broken is not None), None)
        if any(target.wires for target in targets):
            await undisturbed(_cut(vm, jobs, targets))
        if broken is not None and isinstance(error, JobError | NBDRequestError | StalledError):
            raise _no_more(broken, printable(error)) from error
        raise


def _no_more(target: CopyTarget, why: str) -> Error:
    """Return the error that says by which server a copy failed."""
    text = f"the copy to {printable(target.path)} failed: {target.broken or 'not flushed'} ({why})"
    remedy = "look what became of that server, then copy again"
    if target.broken == End.STALLED.value:
        return StalledError(text, remedy=remedy)
    return NBDDisconnectedError(text, remedy=remedy)


async def _cut(vm: Connection, jobs: Sequence[str], targets: Sequence[CopyTarget]) -> None:
    """Cancel the jobs, so that they fail as cancelled ones, then cut every wire.

    Where QEMU itself waits for a server it does not take the one before the other.
    """
    cancelled = asyncio.ensure_future(_cancel(vm, jobs))
    await asyncio.wait({cancelled}, timeout=HOLD)
    for target in targets:
        target.cut()
    with contextlib.suppress(Error):  # whoever undoes the copy says it
        await cancelled


async def _cancel(vm: Connection, ids: Sequence[str]) -> None:
    for name in ids:
        job = Job(vm.monitor, name, "copy")
        try:
            await job.cancel()
        finally:
            job.end()
