"""Polling: no iothread polls while we make QEMU drain, or a guest may hang for ever.

In QEMU before 8.1 an iothread that polls looks at a virtqueue a last time as it stops. During a
drain it sees the guest's requests there, may not serve them, and forgets them; and the guest,
which was told that no kick is needed, waits for ever (K9). All that we do drains:
an export that comes or goes, a snapshot, the start and the end of a job. So around all of it
polling is off::

    hold                                         let_go
    1. lock POLLING_LOCK                         1. lock POLLING_LOCK
    2. read each iothread's poll-max-ns          2. put back what no other guard wants off
    3. add our guard, an object: what they were  3. remove our guard
    4. set them to 0                             4. unlock
    5. unlock

Of all iothreads of the VM, for a transaction drains every disk. A guard says in its data what
the values were; who finds 0 while others hold guards takes the values from theirs, so whoever
is the last puts them back. A controller that is killed leaves its guard, and the values at 0,
which does no harm: the next one of ours takes over what it says, and puts it back.

`poll-max-ns` is never changed while a pivot is pending, which holds the guest by a drain
(K5): exactly that makes a queue be forgotten.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from qmpblock.cancellation import undisturbed
from qmpblock.errors import CommandError, DisconnectedError, Error, RecordError
from qmpblock.host.processes import times_slept
from qmpblock.names import POLLING_LOCK, LockKind, guard_name, lock_kind, new_run
from qmpblock.qemu import lock
from qmpblock.qemu.capabilities import Capabilities
from qmpblock.qemu.lock import Holder
from qmpblock.qemu.monitor import Monitor
from qmpblock.qemu.refusals import no_object

__all__ = ["Guard", "hold", "let_go", "unpolled"]

_log = logging.getLogger(__name__)
# Nanoseconds: so long that a thread which begins to poll does it once for certain, whatever it
# has learned. No user's value: whoever finds it knows that a controller was killed.
_WAKING = 3600 * 10**9
_CLOCK = 32768 - 1  # nanoseconds; QEMU's default but for the last bit: no user's value either
_AWAKE = 0.02  # seconds for a thread that has a CPU to look at its queues
_BUSY = 1.0  # seconds that a busy host may take to give it one
_PENDING = 2.0  # seconds to wait for a pivot of somebody's that is pending


@dataclass(frozen=True)
class Guard:
    """What the holder of a guard says.

    :ivar poll_max_ns: of each iothread, by its id, when nobody holds a guard.
    """

    poll_max_ns: tuple[tuple[str, int], ...]
    more: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class _Ours:
    """What this process holds in one VM, for all of its tasks together.

    :ivar users: how many need it.
    :ivar run: the run of the guard object; empty where none is needed.
    :ivar values: what poll-max-ns of each iothread is when nobody holds a guard.
    :ivar wake: whether the threads are to look at all their queues at the end.
    """

    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    users: int = 0
    run: str = ""
    values: dict[str, int] = field(default_factory=dict)
    wake: bool = False


_guards: WeakKeyDictionary[Monitor, _Ours] = WeakKeyDictionary()


@asynccontextmanager
async def unpolled(
    monitor: Monitor, iothreads: Sequence[dict[str, Any]] | None = None, *, wake: bool = False
) -> AsyncIterator[None]:
    """`hold`, then `let_go`; cancelling waits for the latter."""
    await hold(monitor, iothreads, wake=wake)
    try:
        yield
    finally:
        await undisturbed(let_go(monitor))


async def hold(
    monitor: Monitor, iothreads: Sequence[dict[str, Any]] | None = None, *, wake: bool = False
) -> None:
    """Have no iothread of the VM poll until `let_go`, where polling is a danger.

    Inside another `hold` of the same connection it costs nothing, and on a QEMU that does not
    need it nothing ever. Cancelling leaves all as it was.

    :param iothreads: what query-iothreads has just said, if that is known.
    :param wake: have the threads look at all their queues at the end, so that a guest goes on
        that somebody else's drain has hung. Takes 20 ms. Not done while another controller
        holds a guard.
    :raise BusyError: another controller does not let go of `POLLING_LOCK`.
    """
    if not Capabilities(monitor.version).polling_forgets_queues:
        return
    guard = _guards.setdefault(monitor, _Ours())
    async with guard.turn:
        if guard.users == 0:
            if iothreads is None:
                iothreads = await monitor.execute("query-iothreads")
            guard.run, guard.values, guard.wake = "", {}, wake
            if iothreads:
                await _join(monitor, guard)
        guard.users += 1
        guard.wake |= wake and bool(guard.run)


async def let_go(monitor: Monitor) -> None:
    """Undo one `hold`. Not to be cancelled.

    Where QEMU cannot be reached any more the guard counts as dead: whoever comes next puts
    back what it says.
    """
    guard = _guards.get(monitor)
    if guard is None:
        return
    async with guard.turn:
        guard.users -= 1
        if not guard.users and guard.run:
            await _end(monitor, guard)


async def _end(monitor: Monitor, guard: _Ours) -> None:
    """Put back what our guard says, and remove it."""
    try:
        await _leave(monitor, guard)
    except DisconnectedError:
        lock.abandon(guard.run)
    except Error as error:  # no reason for what was done to have failed
        lock.abandon(guard.run)
        _log.warning("polling of iothreads stays off until the next command of ours: %s", error)


async def _join(monitor: Monitor, guard: _Ours) -> None:
    me = Holder.me(new_run())
    try:
        await lock.acquire(monitor, POLLING_LOCK, me, _nothing, stall=monitor.stall)
        await undisturbed(_join_in_turn(monitor, guard, me.run))
    except BaseException:
        if guard.run:  # cancelled, it is finished all the same, and nobody will let go
            await undisturbed(_end(monitor, guard))
        lock.abandon(me.run)  # should the guard be there after all, it is nobody's
        raise


async def _join_in_turn(monitor: Monitor, guard: _Ours, run: str) -> None:
    try:
        others = await _others(monitor, run)
        dead = [name for name, (holder, _) in others.items() if holder.is_dead()]
        guard.wake |= bool(dead)  # what its controller was about when it died is not known
        known = {name: value for _, said in others.values() for name, value in said.poll_max_ns}
        now = await _threads(monitor)
        polling = [name for name, thread in now.items() if _is_set(thread.poll_max_ns)]
        if polling and await _is_pivot_pending(monitor):
            _log.warning("a pivot is pending: the polling of iothreads is left as it is")
            polling = []
        for name, thread in now.items():
            if name in polling:
                guard.values[name] = thread.poll_max_ns
            elif not _is_set(thread.poll_max_ns) and (name in known or guard.wake):
                guard.values[name] = known.get(name, 0)
        if guard.values:
            guard.run = run
            holder = Holder.me(run, poll_max_ns=list(guard.values.items()))
            await monitor.execute(
                "object-add",
                {"qom-type": "secret", "id": guard_name(run), "data": holder.text()},
            )
        await _set_and_see(monitor, now, dict.fromkeys(polling, 0))
        for name in dead:  # what they say, ours says
            await lock.release(monitor, name)
    finally:
        await lock.release(monitor, POLLING_LOCK)


async def _leave(monitor: Monitor, guard: _Ours) -> None:
    me = Holder.me(new_run())
    try:
        await lock.acquire(monitor, POLLING_LOCK, me, _nothing, stall=monitor.stall)
        try:
            if await _put_back(monitor, guard):
                await lock.release(monitor, guard_name(guard.run))
            else:
                _log.warning("a pivot is pending: polling stays off until the next command of ours")
                lock.abandon(guard.run)
        finally:
            await lock.release(monitor, POLLING_LOCK)
    except BaseException:
        lock.abandon(me.run)
        raise


async def _put_back(monitor: Monitor, guard: _Ours) -> bool:
    """Set what no other living guard says to what it was, where it is as we left it.

    Returns False, and leaves all as it is, while somebody's pivot is pending.
    """
    others = await _others(monitor, guard.run)
    wanted = {
        name
        for holder, said in others.values()
        if not holder.is_dead()
        for name, _ in said.poll_max_ns
    }
    now = await _threads(monitor)
    ours = {
        name: guard.values[name]
        for name, thread in now.items()
        if name in guard.values and name not in wanted and not _is_set(thread.poll_max_ns)
    }
    if ours and not await _wait_for_pivots(monitor):
        return False
    if guard.wake and not wanted and ours:
        # With 0 a thread keeps no clock of its turns, and takes the next one for a very long one,
        # after which it does not poll; so another value comes first.
        await _set_and_see(monitor, now, dict.fromkeys(ours, _CLOCK))
        await _set_and_see(monitor, now, dict.fromkeys(ours, _WAKING))
        await asyncio.sleep(_AWAKE)
    for name, value in ours.items():
        if value or guard.wake:
            await _set(monitor, name, value)
    return True


async def _nothing(_: Holder) -> None:
    """All that the holder of `POLLING_LOCK` did is seen in the guards."""


async def _others(monitor: Monitor, run: str) -> dict[str, tuple[Holder, Guard]]:
    """Return the guards in the VM that are not ours, by their names.

    One that cannot be read is left where it is, and so is what it may have switched off:
    `recover` says so.
    """
    guards = await lock.holders(
        monitor, lambda name: lock_kind(name) is LockKind.GUARD and name != guard_name(run)
    )
    others = {}
    for name, holder in guards.items():
        if isinstance(holder, Holder):
            with contextlib.suppress(RecordError):
                others[name] = holder, holder.says(Guard, name)
    return others


def _is_set(value: int) -> bool:
    """Whether a user's will stands in a thread's poll-max-ns, and not ours."""
    return value not in (0, _CLOCK, _WAKING)


@dataclass(frozen=True)
class _Thread:
    """An iothread: its thread's id, as QEMU knows it, and for how long it polls."""

    id: int
    poll_max_ns: int


async def _threads(monitor: Monitor) -> dict[str, _Thread]:
    return {
        str(one["id"]): _Thread(int(one["thread-id"]), int(one["poll-max-ns"]))
        for one in await monitor.execute("query-iothreads")
    }


async def _set_and_see(
    monitor: Monitor, threads: Mapping[str, _Thread], values: Mapping[str, int]
) -> None:
    """Set poll-max-ns of threads, and wait until each has taken notice: it goes to sleep again.

    On a busy host it may take a while until it gets a CPU. Were a drain to begin before that, a
    thread that polls would end it in the drain. Where it cannot be seen it is given some time.
    """
    pid, seen = monitor.peer_pid, []
    for name, value in values.items():
        thread = threads[name].id
        seen.append((thread, times_slept(pid, thread)))
        await _set(monitor, name, value)
    deadline = asyncio.get_running_loop().time() + _BUSY
    for thread, before in seen:
        if before is None:
            await asyncio.sleep(_AWAKE)
        while before is not None and times_slept(pid, thread) == before:
            if asyncio.get_running_loop().time() > deadline:
                break
            await asyncio.sleep(0.001)


async def _set(monitor: Monitor, name: str, value: int) -> None:
    try:
        await monitor.execute(
            "qom-set", {"path": f"/objects/{name}", "property": "poll-max-ns", "value": value}
        )
    except CommandError as error:
        if not no_object(error):  # unplugged meanwhile
            raise


async def _is_pivot_pending(monitor: Monitor) -> bool:
    """Whether a job, of whomever, holds its guest's I/O by a drain (K5)."""
    return any(
        job["status"] == "pending" and job["type"] in ("commit", "mirror")
        for job in await monitor.execute("query-jobs")
    )


async def _wait_for_pivots(monitor: Monitor) -> bool:
    """Wait a little for pivots of somebody's to be finalized; return whether none is pending."""
    deadline = asyncio.get_running_loop().time() + _PENDING
    while await _is_pivot_pending(monitor):
        if asyncio.get_running_loop().time() > deadline:
            return False
        await asyncio.sleep(0.05)
    return True
