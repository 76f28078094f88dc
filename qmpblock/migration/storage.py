"""Storage: the source's disks, mirrored to the destination until the guest is handed over.

Background mirrors, which are never in the guest's way, of a granularity of 4 KiB: at QEMU's own,
64 KiB, a guest's small writes weigh sixteen times as much, and a slow wire never catches up (K33).
One that has the guest's writes wait for the target (`write-blocking`) has QEMU's heap corrupted
when it is broken off (K33).

Each goes over a wire that this process holds (`qmpblock.copying.wire`), so that one which hangs is
cut from outside of QEMU, whose monitor would wait for it (K32).
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Mapping, Sequence, Set
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qmpblock.cancellation import task_group
from qmpblock.chains.look import unless_changed
from qmpblock.copying.frame import check_actives
from qmpblock.copying.job import joined
from qmpblock.copying.wire import HOLD, Wire, wire_socket
from qmpblock.errors import (
    UNTOUCHED,
    CommandError,
    Error,
    JobError,
    StalledError,
    UnsupportedError,
)
from qmpblock.names import image_node, migration_job, wire_node
from qmpblock.qemu.job import Job, Progress
from qmpblock.qemu.looks import Looks
from qmpblock.qemu.refusals import no_node, tolerate

if TYPE_CHECKING:
    from collections.abc import Callable

    from qmpblock.copying.target import NBDTarget
    from qmpblock.migration.course import Course
    from qmpblock.migration.look import Pair
    from qmpblock.migration.over import Over
    from qmpblock.qemu.connection import Connection
    from qmpblock.qemu.monitor import Subscription

__all__ = ["Storage", "check_can_block"]

_GRANULARITY = 4096
_PAUSED = frozenset({"paused", "standby"})
_GOING = frozenset({"running", "ready"})
_SILENT = 1.0  # seconds without an answer
_LOOK = 0.01  # seconds between looks at mirrors that end, where no event wakes us
_TO_CATCH_UP = (
    "let the guest write less, raise --speed, have its writes wait (--write-blocking-after), or "
    "have it paused until it has gone over (--pause-after)"
)


class Storage:
    """The mirrors of one migration. `start`, `until_ready`, `watched`, `end`; `close` at last.

    :param again: they are there, paused, of an attempt before (`keep`): they go on.
    :ivar jobs: their ids; `wires`: their nodes, each with the socket of its relay; `shields`: the
        node above each of these to which the mirror writes, empty where that is the wire's.
    :ivar patience: seconds that they may take, beside the stall limit, to catch up with the guest.
    """

    def __init__(
        self,
        vm: Connection,
        run: str,
        pairs: Sequence[Pair],
        speed: int,
        show: Callable[[Progress], None],
        course: Course,
        over: Over | None,
        *,
        again: bool = False,
    ) -> None:
        self.jobs = tuple(migration_job(run, number) for number, _ in enumerate(pairs))
        self.wires = tuple(
            (wire_node(run, number), wire_socket(run, number)) for number, _ in enumerate(pairs)
        )
        self.shields = tuple(
            image_node(node) if pair.full else ""
            for (node, _), pair in zip(self.wires, pairs, strict=True)
        )
        self._vm = vm
        self._looks = Looks(vm.monitor)
        self._run = run
        self._credentials = None if over is None else over.here
        self._pairs = pairs
        self._speed = speed
        self._show = show
        self._course = course
        self._again = again
        self._before: dict[str, int] = {}
        self._may_stay = True
        self._laid: list[Wire] = []
        self._jobs: list[Job] = []
        self._seen: dict[str, Progress] = {}
        self._stack = AsyncExitStack()
        self._patience = ExitStack()
        self._ready = asyncio.Event()
        self.patience = 0.0

    def rest_while(self, guest_stands: Callable[[], bool]) -> None:
        """Have nobody look at the mirrors while it may stand: QEMU has something else to do then.

        They are looked at as they end.
        """
        self._looks.rest_while(guest_stands)

    @property
    def copied(self) -> tuple[int, ...]:
        """Bytes that each mirror went over."""
        return tuple(
            max(0, self._seen[name].done - self._before.get(name, 0)) if name in self._seen else 0
            for name in self.jobs
        )

    async def start(self, targets: Sequence[NBDTarget], blank: Sequence[bool]) -> None:
        """Lay the wires, and begin: the first disk is copied while the next one's is laid.

        Laid all at once they cost the copy of eight disks a twelfth of its time.

        :param blank: whether a target reads as zeros, all of it: then none is zeroed first (F36).
        :raise GraphError: somebody has changed a disk's chain, or taken a snapshot of it.
        :raise Error: it cannot be; what was begun is left to whoever undoes it.
        """
        tops = []  # QEMU takes for theirs whichever layer is active when their job begins (K46)
        every = zip(self.jobs, self._pairs, targets, blank, self.shields, strict=True)
        for number, (name, pair, target, zeros, shield) in enumerate(every):
            laying = Wire.open(
                *(self._vm, target),
                run=self._run,
                number=number,
                credentials=self._credentials,
                discard="ignore" if pair.full else "unmap",
                again=self._again,
            )
            wire = await self._stack.enter_async_context(laying)
            self._laid.append(wire)
            end = await self._shielded(shield, wire)
            job = Job(self._vm.monitor, name, "mirror", self._looks)
            job.to_catch_up = _TO_CATCH_UP
            self._jobs.append(job)
            if self._again:
                await self._go_on(job)
                continue
            how = self._sync(pair, blank=zeros)
            arguments = {
                "job-id": name,
                "device": pair.source.chain.root.name,
                "target": end,
                **how,
                "copy-mode": "background",
                "granularity": _GRANULARITY,
                "on-source-error": job.on_error("report"),
                "on-target-error": "stop",  # or it would end when QEMU must not (K34)
                "speed": self._share,
                "auto-dismiss": False,
            }
            async with unless_changed(self._vm, [pair.source]):
                await self._vm.monitor.execute("blockdev-mirror", arguments)
            if how["sync"] == "top":
                tops.append(pair.source)
        if tops:
            await check_actives(self._vm, tops)

    async def _shielded(self, shield: str, wire: Wire) -> str:
        """Return the node that a mirror writes to: the wire's, or one above it.

        A mirror has zeros take away what they are written to, whatever `discard` of the node to
        which it writes them says; that of the node below counts (F27).
        """
        if not shield:
            return wire.node
        self._stack.push_async_callback(self._take_away, shield)
        await self._vm.monitor.execute(
            "blockdev-add", {"driver": "raw", "node-name": shield, "file": wire.node}
        )
        return shield

    async def _take_away(self, shield: str) -> None:
        await tolerate(no_node, self._vm.monitor.execute("blockdev-del", {"node-name": shield}))

    @property
    def _share(self) -> int:
        return -(-self._speed // len(self._pairs))

    async def _go_on(self, job: Job) -> None:
        """Have a mirror that was kept go on: with what it had not copied, and was written since.

        :raise JobError: it is not as it was left.
        """
        info = await job.look()
        if info is None or info["status"] not in _PAUSED:
            raise JobError(job.id, job.type, "it was kept, and is not as it was left")
        self._before[job.id] = int(info["current-progress"])
        await job.set_speed(self._share)
        await job.resume()

    def _sync(self, pair: Pair, *, blank: bool) -> dict[str, object]:
        """Return how a mirror is told what is to be copied: all that the disk holds, or its top.

        Of that nothing is taken for zero at the target: what it lies on shows through (K2).
        """
        if pair.top:
            return {"sync": "top"}
        if blank and self._vm.capabilities.mirrors_take_word_of_zeros:
            return {"sync": "full", "target-is-zero": True}
        # Of one layer the uppermost is all.
        return {"sync": "top" if blank and len(pair.source.chain.layers) == 1 else "full"}

    @asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """Have the body broken off where a mirror fails.

        :raise JobError: one did: the destination died, or an image failed.
        :raise StalledError: one does not move, or does not catch up with the guest.
        """
        async with task_group() as group:
            watching = [group.create_task(self._follow(job)) for job in self._jobs]
            yield
            for one in watching:
                one.cancel()

    async def until_ready(self) -> None:
        """Wait until every disk is as far as the guest; inside `watched`."""
        await self._ready.wait()

    async def have_writes_wait(self) -> None:
        """From now on the guest's writes wait until they are at the destination, too (K33).

        So the destination gets no more than some seconds for an answer: the guest waits for it.

        :raise CommandError: QEMU refused.
        """
        self.hurry()
        self._may_stay = False  # paused or not, the guest's writes would go there
        for name in self.jobs:
            change = {"id": name, "type": "mirror", "copy-mode": "write-blocking"}
            await self._vm.monitor.execute("block-job-change", change)

    async def _follow(self, job: Job) -> None:
        async for seen in job.follow(converging=self._vm.stall + self.patience):
            self._note(job.id, seen)
            if seen.errors:
                raise JobError(job.id, job.type, "the destination, or an image, failed a request")
            if seen.status == "concluded":
                raise JobError(job.id, job.type, seen.error or "somebody ended it")
            if len(self._seen) == len(self._jobs):
                every = tuple(self._seen.values())
                if all(one.ready for one in every):
                    self._ready.set()
                self._show(joined(every))

    def _note(self, name: str, seen: Progress) -> None:
        self._seen[name] = seen
        done = max(0, seen.done - self._before.get(name, 0))
        self._course.mirrored(time.monotonic(), name, done, ready=seen.ready)

    def hurry(self) -> None:
        """Give the destination no more than some seconds for an answer from now on.

        The guest stands soon, and waits for all that QEMU waits for.
        """
        for wire in self._laid:
            self._patience.enter_context(wire.relay.within(wire.hold))

    async def end(self) -> None:
        """Have all mirrors end, now that the guest stands: each disk is there what it is here.

        By a soft cancel, which of a ready mirror is no failure but its end.

        :raise JobError: one failed.
        """
        self._may_stay = False
        monitor, left = self._vm.monitor, set(self.jobs)
        asked = (("block-job-cancel", {"device": name}) for name in self.jobs)  # not by force
        with monitor.subscribe(
            "BLOCK_JOB_COMPLETED", "BLOCK_JOB_ERROR", "JOB_STATUS_CHANGE"
        ) as changes:
            for said in await monitor.each(*asked):
                if isinstance(said, CommandError):
                    raise said
            self._end_told(left, await self._until_told(left, changes))
            while left:  # of whatever it has not said, or not how
                for one in await monitor.execute("query-block-jobs"):  # of all at once
                    name = one["device"]
                    if name in left and one.get("io-status", "ok") != "ok":  # it would never end
                        raise JobError(name, "mirror", "the destination failed a request")
                    if name in left and one.get("status") == "concluded":
                        left.remove(name)
                        self._ended(name, one)
                if left:
                    await self._until_told(left, changes)

    def _end_told(self, left: set[str], told: Mapping[str, Mapping[str, object]]) -> None:
        """Note those that are said to have ended, and how."""
        for name in left & told.keys():
            left.remove(name)
            self._ended(name, told[name])

    def _ended(self, name: str, how: Mapping[str, Any]) -> None:
        """Note that one has.

        :param how: QEMU's word of it: a BLOCK_JOB_COMPLETED, or what query-block-jobs says.
        :raise JobError: it has failed.
        """
        if "error" in how:
            raise JobError(name, "mirror", str(how["error"]))
        self._note(name, replace(self._seen[name], done=int(how["offset"])))

    async def _until_told(
        self, left: Set[str], changes: Subscription
    ) -> dict[str, Mapping[str, Any]]:
        """Wait until all of these are said to have ended, or one to have failed; or for no news.

        Return what was said of how those ended that have: BLOCK_JOB_COMPLETED comes first. To look
        at every change would take QEMU longer than to end them, and the guest stands.
        """
        how: dict[str, Mapping[str, Any]] = {}
        told: set[str] = set()
        with contextlib.suppress(StalledError):
            while not left <= told:
                said = await changes.get(_LOOK)
                data = said["data"]
                if said["event"] == "BLOCK_JOB_ERROR":
                    break
                if said["event"] == "BLOCK_JOB_COMPLETED":
                    how[str(data.get("device"))] = data
                elif data.get("status") == "concluded":
                    told.add(data["id"])
        return {name: how[name] for name in told & how.keys()}

    async def take_away(self) -> None:
        """Take away the mirrors, which have ended, and all that they lay on, at once.

        What cannot be is left to whoever undoes it, and says why.
        """
        nodes = (*filter(None, self.shields), *(node for node, _ in self.wires))
        with contextlib.suppress(Error):
            await self._vm.monitor.each(
                *(("job-dismiss", {"id": name}) for name in self.jobs),
                *(("blockdev-del", {"node-name": node}) for node in nodes),
            )

    def is_gone(self) -> None:
        """Note that nothing of it is in QEMU any more."""
        for wire in self._laid:
            wire.is_gone()

    @property
    def well(self) -> bool:
        """Whether every mirror can go on later, and nothing is being waited for."""
        wires = [wire.relay for wire in self._laid]
        there = self._may_stay and 0 < len(self._jobs) == len(self.jobs)
        return there and all(one.ended is None and one.stalled_for < _SILENT for one in wires)

    async def keep(self) -> bool:
        """Have every mirror stay for another attempt, paused; return whether they do.

        What one was told is written then its target has, and what it was not told so it copies
        again. Where that is not so of all of them, or the guest's writes wait for them, they are to
        be broken off.
        """
        if not self.well:
            return False
        self.hurry()  # at the end of that patience what is asked for fails, and is copied again
        for job in self._jobs:
            with contextlib.suppress(CommandError):  # it is paused, or has ended
                await job.pause()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(2 * HOLD):
                while (states := await self._states()) <= _PAUSED | _GOING:
                    if states <= _PAUSED:
                        return True
                    await asyncio.sleep(_LOOK)
        return False

    async def _states(self) -> set[str]:
        known = {one["id"]: one["status"] for one in await self._vm.monitor.execute("query-jobs")}
        return {str(known.get(name, "null")) for name in self.jobs}

    def leave(self) -> None:
        """Have the nodes stay, too, on which mirrors lie that were kept. Idempotent."""
        for wire in self._laid:
            wire.leave()

    async def break_off(self) -> None:
        """Cancel what runs, and wait for it; the wires stay. Idempotent."""
        for job in self._jobs:
            await job.cancel()
        for job in self._jobs:
            await job.wait_concluded()

    def cut(self) -> None:
        """Cut the wires: nothing waits for the destination any more. Idempotent."""
        for wire in self._laid:
            wire.cut()

    async def close(self) -> None:
        """Close the relays; the jobs and nodes are gone by then, or go with this. Idempotent."""
        for job in self._jobs:
            job.end()
        self.cut()
        self._patience.close()
        await self._stack.aclose()


async def check_can_block(vm: Connection) -> None:
    """See that the guest's writes can be had wait while a mirror runs.

    :raise UnsupportedError: this QEMU has no command for it; nothing was touched.
    """
    commands = {one["name"] for one in await vm.monitor.execute("query-commands")}
    if "block-job-change" not in commands:
        raise UnsupportedError(
            "this QEMU cannot have a mirror make the guest's writes wait once it runs (it has "
            "no block-job-change), and one that does so from the beginning can end it (K33)",
            standing=UNTOUCHED,
            remedy="leave --write-blocking-after out; let the guest write less meanwhile",
        )
