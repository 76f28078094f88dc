"""What is done to the two QEMUs of a migration when it does not go on, or is to be finished.

One function a move (`qmpblock.migration.states.Move`), each idempotent, for recoveries, whose wires
are nobody's any more. The engine, which holds its own, cuts those; the last two are its own, too.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from qmpblock.errors import (
    CommandError,
    Error,
    MonitorError,
    StalledError,
)
from qmpblock.migration.states import ACTIVE, SETTLING
from qmpblock.names import is_of_run, paused_node, stopped_node
from qmpblock.qemu.instant import mark
from qmpblock.qemu.refusals import no_node, tolerate
from qmpblock.qemu.runstate import STOPPED_ITSELF

if TYPE_CHECKING:
    from qmpblock.qemu.connection import Connection
    from qmpblock.qemu.monitor import Monitor

__all__ = ["call_back", "cont", "cut", "mark_stopped", "quit_vm", "settle", "unmark_pause"]

_WENT_ON = STOPPED_ITSELF | {"running", "suspended"}
_POLL = 0.02  # seconds
_YANK = 2.0  # seconds for QEMU to cut what it is told to cut
_OWN_DECISION = 10.0  # seconds for a source to decide how its migration ends

_log = logging.getLogger(__name__)


async def cut(source: Monitor, run: str, *, mirrors: bool = True) -> None:
    """Cut the source's connections to the destination, from outside of what QEMU is at work on.

    QEMU would hang with most of what it is told while one of them is silent. What is not there to
    be cut any more is none's loss.

    :param mirrors: those of the disks, too.
    """
    with contextlib.suppress(TimeoutError, Error):
        async with asyncio.timeout(_YANK):
            instances = await source.execute_at_once("query-yank")
            wanted = [
                one
                for one in instances
                if one["type"] == "migration"
                or (mirrors and one["type"] == "block-node" and is_of_run(one["node-name"], run))
            ]
            if wanted:
                await source.execute_at_once("yank", {"instances": wanted})


async def call_back(source: Connection, run: str) -> None:
    """Have the source give up a migration that it can call back, and wait until it has the guest.

    :raise StalledError: it does not come back.
    """
    await cut(source.monitor, run)

    # One that is on its way fails, or comes to where the guest is held: only there it can be
    # called back, or the guest might stand for ever (K35).
    with contextlib.suppress(StalledError):
        await _until(
            source,
            lambda _, migration: migration not in ACTIVE - {"pre-switchover"},
            "",
            limit=_OWN_DECISION,
        )
    with contextlib.suppress(CommandError):  # it has ended by itself
        await source.monitor.execute("migrate_cancel")
    await _until(
        source,
        lambda run_state, migration: (
            run_state != "finish-migrate" and migration not in ACTIVE | SETTLING
        ),
        "the source does not give up the migration",
    )


async def settle(source: Connection, run: str) -> None:
    """Wait until the source has decided how its migration ends; cut it where that takes long.

    It completes, or it fails and the guest goes on there.

    :raise StalledError: it does neither.
    """

    def decided(run_state: str, migration: str) -> bool:
        return run_state != "finish-migrate" and migration not in SETTLING

    with contextlib.suppress(StalledError):
        await _until(source, decided, "", limit=_OWN_DECISION)
        return
    await cut(source.monitor, run, mirrors=False)
    await _until(source, decided, "the source does not decide how the migration ends")


async def cont(vm: Connection) -> None:
    """Have a guest go on, and wait until it does. Only for whoever may.

    It may be asleep, or stop itself at once: at an I/O error that is still there, say.

    :raise StalledError: it does not.
    """
    await vm.monitor.execute("cont")
    await _until(vm, lambda state, _: state in _WENT_ON, "the guest was continued, and stands")


async def unmark_pause(source: Connection, run: str) -> None:
    """Have nothing say any more that the migration paused the guest: it runs. Idempotent."""
    gone = source.monitor.execute("blockdev-del", {"node-name": paused_node(run)})
    await tolerate(no_node, gone)


async def mark_stopped(source: Connection, run: str) -> None:
    """Say at the source that the guest had stopped, which is to stay so. Idempotent.

    It is a node of the change's, and goes with it.
    """
    await mark(source, stopped_node(run))


async def quit_vm(vm: Connection, has_ended: Callable[[], bool]) -> bool:
    """End a QEMU, and wait until it has ended; return whether it certainly has.

    :param has_ended: tells by its process, where that can be seen.
    :raise StalledError: it was told, and has not.
    """
    heard = False
    with contextlib.suppress(MonitorError):
        await vm.monitor.execute("quit")
        heard = True
    loop = asyncio.get_running_loop()
    deadline = loop.time() + vm.stall
    while not vm.monitor.closed and not has_ended():
        if loop.time() > deadline:
            raise StalledError(f"the QEMU of {vm.monitor.address} was told to quit, and does not")
        await asyncio.sleep(_POLL)
    if not vm.monitor.can_pass_fds:  # no process can be seen; but it had the word
        return heard
    deadline = loop.time() + 2
    while loop.time() < deadline:  # over TCP that is never seen
        if has_ended():
            return True
        await asyncio.sleep(_POLL)
    return heard


async def _until(
    vm: Connection, reached: Callable[[str, str], bool], words: str, limit: float | None = None
) -> None:
    """Wait until run state and migration are as wanted.

    :raise StalledError: they are not, within the stall limit.
    """
    loop, monitor = asyncio.get_running_loop(), vm.monitor
    deadline = loop.time() + (vm.stall if limit is None else limit)
    state = ""
    while True:
        with contextlib.suppress(TimeoutError, StalledError):
            async with asyncio.timeout_at(deadline):
                migration = str((await monitor.execute("query-migrate")).get("status", "none"))
                run = str((await monitor.execute("query-status"))["status"])
                state = f"{run}/{migration}"
                if reached(run, migration):
                    return
        if loop.time() > deadline:
            raise StalledError(f"{words}: it is {state or 'silent'}")
        await asyncio.sleep(_POLL)
