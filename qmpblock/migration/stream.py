"""Stream: QEMU's own migration, from its start until the guest stands, and from there to its end.

With the capabilities that make it safe (`qmpblock.migration.settings`):

- `return-path`: without it the source says `completed` of a destination that has died (K31);
- `pause-before-switchover`: the guest stands while the mirrors end;
- `events`.

What runs through is passed on by a relay of ours, or by several (`qmpblock.migration.channels`).
QEMU's monitor hangs for ever where the destination falls silent at the wrong moment (K32); when the
relay is cut, the source hears that its peer is gone, and the guest goes on there by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import ExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any

from qmpblock.cancellation import task_group
from qmpblock.copying.relay import Relay
from qmpblock.copying.target import credentials_object
from qmpblock.copying.wire import user_of
from qmpblock.errors import Error, StalledError, printable
from qmpblock.migration.channels import Channels
from qmpblock.migration.moving import PASSES, Moving, count
from qmpblock.migration.states import ACTIVE
from qmpblock.names import stream_socket, stream_wire, wire_credentials
from qmpblock.qemu.refusals import not_found, tolerate
from qmpblock.qemu.runstate import STANDS

if TYPE_CHECKING:
    from qmpblock.migration.course import Course
    from qmpblock.migration.landing import Landing
    from qmpblock.migration.over import Over
    from qmpblock.migration.settings import Preset
    from qmpblock.qemu.connection import Connection
    from qmpblock.qemu.job import Progress
    from qmpblock.qemu.monitor import Subscription

__all__ = ["OVER", "Stream", "told_at"]

#: States of a migration that is none, or that has ended with the guest still here.
OVER = frozenset({"none", "failed", "cancelled"})
_ON_ITS_WAY = ACTIVE | {"device"}
#: Events that say before the guest stops that it is about to stop itself, and as what.
_STOPPING = {
    "BLOCK_IO_ERROR": "io-error",
    "GUEST_PANICKED": "guest-panicked",
    "WATCHDOG": "watchdog",
}
_LOOK = 0.1  # seconds between looks, where no event wakes us
_SOON = 0.05  # likewise, while the guest stands
_BY_TURNS = 0.01  # likewise, where events may be missed
_AT_ONCE = 0.001  # likewise, of what follows without an event


class Stream:
    """One migration of QEMU's. `prepare`, `start`, `until_held`, `go_on`, `until_completed`.

    :ivar begun: whether QEMU may have been told to migrate.
    :ivar stands: whether the guest may have stopped since: it has said so, or says nothing now.
    :ivar went_on: whether the guest, since it stopped last, has gone on at the source.
    :ivar stood_before: whether it stood before QEMU held it: it showed so, or QEMU looked at the
        memory again after it had stopped, as it never does where it stops a guest to hold it (F40);
        or it was about to stop itself, of which there is an event before (F42).
    :ivar shown: as what it stood then, in QEMU's word; empty where that was not seen.
    :ivar shutdown: why QEMU was told to shut down, by the guest or not, in its word; empty: it was
        not.
    :ivar transferred: bytes, as QEMU counts them.
    :ivar downtime: seconds for which the guest stood until all was sent, as QEMU tells it; None
        where it has not.
    """

    def __init__(
        self,
        vm: Connection,
        run: str,
        preset: Preset,
        show: Callable[[Progress], None],
        course: Course,
        over: Over | None = None,
        channels: int = 0,
    ) -> None:
        self.begun = False
        self.stands = False
        self.went_on = False
        self.stood_before = False
        self.shown = ""
        self.shutdown = ""
        self.transferred = 0
        self.downtime: float | None = None
        self._course = course
        self._vm = vm
        self._run = run
        self._credentials = None if over is None else over.here
        self._preset = preset
        self._show = show
        self._stack = ExitStack()
        self._channels = channels
        self._wire: Relay | Channels | None = None
        self._stopped: float | None = None
        self._stands = False
        self._said = ""  # by the last event of the migration
        self._moving = Moving()
        self._limit: asyncio.Timeout | None = None
        self._longest = 0.0
        # Before the migration: what it says comes before a reply.
        self._events = vm.monitor.subscribe(
            "MIGRATION",
            "MIGRATION_PASS",
            "RESUME",
            "SHUTDOWN",
            "STOP",
            *_STOPPING,
            match=self._hears,
        )

    # -- what QEMU is told before

    async def prepare(self) -> None:
        """Switch on what makes it safe, and off what does not go with it; `restore` takes it back.

        :raise CommandError: QEMU refused.
        """
        if self._credentials is not None:
            name = wire_credentials(stream_wire(self._run))
            await self._vm.monitor.execute(
                "object-add", credentials_object(self._credentials, name)
            )
        await self._preset.apply()
        parameters = await self._vm.monitor.execute("query-migrate-parameters")
        self._moving = Moving(int(parameters.get("downtime-limit", 0)) / 1e3)

    async def restore(self) -> None:
        """Take back what `prepare` changed. Idempotent."""
        await self._preset.restore()

    # -- its course

    async def start(self, landing: Landing) -> None:
        """Begin, to a destination that waits.

        :raise CommandError: QEMU refused: something in the VM cannot migrate.
        """
        if self._channels:
            await self._start_by_channels(landing)
            return
        monitor, name = self._vm.monitor, stream_socket(self._run)
        async with landing.listening() as there:
            ours, theirs = socket.socketpair()
            self._wire = self._stack.enter_context(Relay.between(there, ours))
            with theirs:
                await monitor.pass_fd(name, theirs.fileno())
            try:
                self._events.pending()
                self.begun = True
                await monitor.execute("migrate", {"uri": f"fd:{name}"})
            except BaseException:  # else QEMU has taken it: it has no name any more
                await tolerate(not_found, monitor.execute("closefd", {"fdname": name}))
                raise

    async def _start_by_channels(self, landing: Landing) -> None:
        """Begin by one connection more than there are channels; QEMU makes them all."""
        monitor, name = self._vm.monitor, stream_wire(self._run)
        channels = Channels(name, await landing.listen(), self._channels + 1)
        self._stack.callback(channels.close)
        channels.open(user_of(monitor))
        self._wire = channels
        self._events.pending()
        self.begun = True
        await monitor.execute("migrate", {"uri": f"unix:{channels.path}"})

    @asynccontextmanager
    async def standing(self, longest: float) -> AsyncIterator[None]:
        """Have the body broken off where the guest stands for longer.

        It does from QEMU's STOP on, of which nothing may be heard, for a source that has stopped
        its guest may say nothing any more (K32). Where it does answer, and says that the memory
        still moves, somebody else has stopped the guest.

        :param longest: seconds.
        :raise TimeoutError: it stood so long.
        """
        async with asyncio.timeout(None) as limit:
            self._limit, self._longest = limit, longest
            try:
                yield
            finally:
                self._limit = None

    @asynccontextmanager
    async def powered(self) -> AsyncIterator[None]:
        """Have the body broken off where the guest powers itself off, and its QEMU stays.

        :raise Error: it has: there is no guest that could go over.
        """
        with self._vm.monitor.subscribe("SHUTDOWN") as heard:
            async with task_group() as group:
                watching = group.create_task(self._until_powered_off(heard))
                yield
                watching.cancel()

    async def _until_powered_off(self, heard: Subscription) -> None:
        while True:
            await heard.get()  # most end with that word, and answer nothing more
            if (await self._vm.monitor.execute("query-status"))["status"] == "shutdown":
                raise Error(
                    f"the guest has powered itself off ({self.shutdown})",
                    remedy="end its QEMU (quit); to have it run again: system_reset, then cont",
                )

    def _count_from_now(self) -> None:
        self._until(asyncio.get_running_loop().time() + self._longest)

    def _until(self, when: float | None) -> None:
        if self._limit is not None and not self._limit.expired():
            self._limit.reschedule(when)

    async def until_held(self) -> None:
        """Wait until the guest stands, and QEMU waits for us to go on.

        :raise Error: the migration has ended otherwise, in QEMU's words.
        :raise StalledError: it does not move, or does not converge, for the stall limit.
        """
        moving, stall = self._moving, self._vm.stall
        while True:
            if not self.stands:
                self.stands = True  # as long as it says nothing
                self._count_from_now()
            if await self._is_held():
                return
            migration, run = await self._vm.monitor.read("query-migrate", "query-status")
            self._note(migration)
            if run["status"] in STANDS:
                self.stood_before, self.shown = True, run["status"]
            status = str(migration.get("status"))
            if status == "pre-switchover":
                return
            self.stands = False
            self._until(None)
            self._check(migration)
            seen = moving.add(time.monotonic(), migration)
            self._show(seen)
            if seen.idle > stall:
                raise StalledError(
                    f"the migration is {printable(status)} and has not moved for {stall:g} s",
                    remedy="look whether the destination hangs, or give a longer --stall",
                )
            if moving.hopeless(stall):
                raise moving.diverging(stall)
            await self._nap(_LOOK)

    async def _is_held(self) -> bool:
        """Whether QEMU has said so, and shows it; what else there is to know takes it as long."""
        if self._said != "pre-switchover":
            return False
        shown = await self._vm.monitor.execute("query-status")
        return bool(shown["status"] == "finish-migrate")

    async def go_on(self) -> None:
        """Have QEMU send the rest, while the guest stands."""
        await self._vm.monitor.execute("migrate-continue", {"state": "pre-switchover"})

    async def until_completed(self) -> None:
        """Wait until the source shows that the destination has all of it. After `until_told`.

        :raise Error: it has not: the guest goes on at the source by itself.
        """
        while True:
            # In this order: 11.1 says `completed` a moment before it leaves finish-migrate.
            migration, status = await self._vm.monitor.read("query-migrate", "query-status")
            self._note(migration)
            self._check(migration)
            if migration.get("status") == "completed":
                if status["status"] == "postmigrate":
                    return
                await self._nap(_AT_ONCE)
            else:
                await self.until_told()

    async def until_told(self) -> None:
        """Wait until QEMU says that it has ended, however; or for no news.

        Not asked meanwhile, for it answers between the parts that it sends.
        """
        limit = _BY_TURNS if self._vm.monitor.by_turns else _SOON
        with contextlib.suppress(StalledError):
            while True:
                said = await self._events.get(limit)
                if said["event"] == "MIGRATION" and said["data"].get("status") not in _ON_ITS_WAY:
                    return

    async def look_back(self) -> None:
        """Note what QEMU counted: it says `completed` a moment before it has counted the downtime.

        Not while the guest stands: nothing waits for it.
        """
        if not self.downtime:
            await self._look()

    @property
    def stopped(self) -> float | None:
        """When the guest stopped, by the clock of QEMU's host; None where it did not say."""
        return self._stopped

    async def _look(self) -> Mapping[str, Any]:
        migration: Mapping[str, Any] = await self._vm.monitor.execute("query-migrate")
        self._note(migration)
        return migration

    def _note(self, migration: Mapping[str, Any]) -> None:
        ram, downtime = migration.get("ram", {}), migration.get("downtime")
        moved, left, number = (count(ram, name) for name in ("transferred", "remaining", PASSES))
        if moved:
            self.transferred = moved
            self._course.sent(time.monotonic(), moved, left, number)
        if isinstance(downtime, int) and migration.get("status") == "completed":
            self.downtime = downtime / 1e3

    def _check(self, migration: Mapping[str, Any]) -> None:
        status = str(migration.get("status"))
        if status in ("failed", "cancelled", "cancelling", "failing"):
            why = printable(migration.get("error-desc") or "QEMU says no more")
            raise Error(
                f"the migration has {'failed' if status[0] == 'f' else 'been cancelled'}: {why}",
                remedy="see what the destination's QEMU says on its stderr; it has to be the same "
                "machine, with the same devices",
            )

    async def _nap(self, limit: float) -> None:
        with contextlib.suppress(StalledError):  # no event is no news
            await self._events.get(limit)
        self._events.pending()

    def _hears(self, event: Mapping[str, Any]) -> bool:
        """Take down what comes, as it comes: for a while after STOP QEMU answers to nothing."""
        now = time.monotonic()
        if event["event"] == "MIGRATION":
            self._said = str(event.get("data", {}).get("status"))
        elif event["event"] == "STOP":
            self._stopped = told_at(event)
            self._course.stops(now)
            self.went_on = False
            self._stands = True
            if self.begun:
                self.stands = True
                self._count_from_now()
        elif event["event"] == "RESUME":
            self.went_on = True
            self.stands = self._stands = self.stood_before = False
            self.shown = ""
            self._until(None)
        elif event["event"] == "MIGRATION_PASS":
            self._course.passes_on(now, count(event.get("data", {}), "pass"))
            self.stood_before = self._stands or bool(self.shown)
        elif event["event"] == "SHUTDOWN":
            self.shutdown = printable(event.get("data", {}).get("reason") or "it does not say why")
        elif event.get("data", {}).get("action") in ("pause", "stop") and not self._stands:
            self.stood_before, self.shown = True, _STOPPING[event["event"]]
        return True

    # -- the way back

    async def cancel(self) -> None:
        """Have QEMU give it up. It is over when `is_over`."""
        await self._vm.monitor.execute("migrate_cancel")

    async def state(self) -> tuple[str, str]:
        """Return what query-status and query-migrate say."""
        migration = await self._vm.monitor.execute("query-migrate")
        status = await self._vm.monitor.execute("query-status")
        return str(status["status"]), str(migration.get("status", "none"))

    def cut(self) -> None:
        """Cut the connections: the source hears that its peer is gone. Idempotent."""
        if self._wire is not None:
            self._wire.cut()

    def close(self) -> None:
        """Let go of the connections, and of the events. Idempotent."""
        self._events.close()
        self._stack.close()


def told_at(event: Mapping[str, Any]) -> float | None:
    """Return when QEMU sent an event, in seconds of its host's clock; None where that is not said.

    Of what is under way here nothing is in it.
    """
    stamp = event.get("timestamp")
    told = (
        [stamp.get(part) for part in ("seconds", "microseconds")] if isinstance(stamp, dict) else []
    )
    seconds, micro = told if len(told) == 2 else (None, None)
    return seconds + micro / 1e6 if isinstance(seconds, int) and isinstance(micro, int) else None
