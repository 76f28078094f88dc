"""An instant: what several commands do while no guest runs, so that it is one moment to the guest.

A node of ours, which does nothing, says that it was we who paused the VM. It is there from before
`stop` until after `cont`, so that whoever comes after a controller that was killed in between has
the guest go on, and nobody has one go on that an operator has paused.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from qmpblock.qemu.refusals import duplicate_node, no_node, tolerate

if TYPE_CHECKING:
    from qmpblock.qemu.connection import Connection

__all__ = ["instant", "mark", "pause", "resume"]


@asynccontextmanager
async def instant(vm: Connection, node: str) -> AsyncIterator[bool]:
    """Pause the VM for the body, unless it is paused; then go on, if the body went well.

    Yields whether it was we who paused it.

    If not, going on is for whoever undoes the change: `resume`, first of all. So is it where this
    is cancelled. The guest is paused for as long as requests in flight take to end, and the body.

    :param node: its name, of a node of ours.
    """
    with vm.monitor.in_one_turn():
        if not await pause(vm, node):
            yield False
            return
        yield True
        await resume(vm, node)


async def pause(vm: Connection, node: str) -> bool:
    """Pause a VM that runs, until `resume`; return whether it did.

    :param node: its name, of a node of ours.
    """
    with vm.monitor.subscribe("STOP") as stops:
        if not await _runs(vm):
            return False
        # It is there where a change is carried on whose controller died just before `stop`.
        await mark(vm, node)
        if stops.pending() and not await _runs(vm):
            await tolerate(no_node, vm.monitor.execute("blockdev-del", {"node-name": node}))
            return False  # somebody has paused it since: it is not ours to go on
    if vm.monitor.is_lent:
        # Of a `stop` behind its back it hears, and lets its locks on the images go for good.
        await vm.monitor.through(lambda lender: lender.suspend())
    else:
        await vm.monitor.execute("stop")
    return True


async def _runs(vm: Connection) -> bool:
    return (await vm.monitor.execute("query-status"))["running"] is True


async def mark(vm: Connection, node: str) -> None:
    """Add a node that does nothing, and says by its name what is so. Idempotent.

    :param node: its name.
    """
    says = {"driver": "null-co", "node-name": node, "size": 0, "read-zeroes": True}
    await tolerate(duplicate_node, vm.monitor.execute("blockdev-add", says))


async def resume(vm: Connection, node: str) -> None:
    """Have a VM go on that `instant` has paused. Idempotent.

    One that is not merely paused, but stopped for an error say, is left as it is.
    """
    if (await vm.monitor.execute("query-status"))["status"] == "paused":
        if vm.monitor.is_lent:
            await vm.monitor.through(lambda lender: lender.resume())
        else:
            await vm.monitor.execute("cont")
    await tolerate(no_node, vm.monitor.execute("blockdev-del", {"node-name": node}))
