"""Why a guest hangs: what both sides of its virtio queues see, by QMP and /proc alone.

A guest that waits for its disk has requests in a ring in its RAM. Beside that ring's indices
stand QEMU's own, so that it can be told who forgot what (`Queue.cause`)::

    in the ring, not taken by QEMU   kicks are off               left off after a drain
                                     on, QEMU has seen them      forgotten in a drain (K9)
                                     on, QEMU has not            no kick came (K10), or it waits
    taken, not done                                              a job, the storage, a drain
    all done                                                     the interrupt, or the guest

Then it is tried what wakes it, where that can do no harm: a kick of each eventfd of QEMU, a turn
of polling of each iothread, stop and cont. Ordinary harness code calls `diagnose` by way of the
error that a guest's silence raises; a test of a guest without a console can call it itself.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qmpblock.errors import CommandError, Error, printable
from qmpblock.qemu.monitor import Monitor
from qmpblock.testing.threads import threads

__all__ = ["Look", "Queue", "diagnose", "look", "wake"]

_ANSWER = 5.0  # seconds for QEMU to answer one question
_MOVES = 1.0  # seconds in which a guest that was woken goes on
_POLL = 0.02  # seconds
_POLLING = 3600 * 10**9  # nanoseconds: a thread that begins to poll does it once for certain
_CLOCK = 32768  # nanoseconds; a thread whose value was 0 must have slept with another one first
_QUEUES = 1024  # of one device, at most (VIRTIO_QUEUE_MAX)
_PIDFD_GETFD = 438  # the system call, on every architecture but alpha

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Queue:
    """One virtqueue that the guest drives.

    :ivar device: the QOM path of its device.
    :ivar offered: the guest's index of requests in the ring (16 bits, as all of them).
    :ivar seen: up to where QEMU has looked at the ring.
    :ivar taken: up to where QEMU has taken requests from it.
    :ivar done: up to where QEMU has answered.
    :ivar kicks_off: whether QEMU has told the guest not to kick.
    :ivar in_flight: requests that QEMU has taken and not answered.
    """

    device: str
    number: int
    offered: int
    seen: int
    taken: int
    done: int
    kicks_off: bool
    in_flight: int

    def cause(self) -> str:
        """Say what holds the requests in it; empty where there are none."""
        waiting = (self.offered - self.taken) & 0xFFFF
        if waiting and self.kicks_off:
            return (
                f"{waiting} requests are in the ring and kicks are off: QEMU left its "
                "notifications off after a drain (8.1), or polls and is held by a drain"
            )
        if waiting and self.seen != self.taken:
            return (
                f"{waiting} requests are in the ring, QEMU has seen them and not taken them: "
                "forgotten as an iothread stopped polling in a drain (K9)"
            )
        if waiting:
            return (
                f"{waiting} requests are in the ring and QEMU has not seen them: no kick came (a "
                "memory barrier that TCG drops with one vCPU before 8.1, K10), or it waits in an "
                "eventfd because a drain is left over or a thread is stuck"
            )
        if self.in_flight:
            return (
                f"QEMU works on {self.in_flight} requests: a job, the storage, or a drain holds "
                "them"
            )
        return ""

    def describe(self) -> str:
        """Return all of it in a line."""
        return (
            f"queue {self.number} of {self.device}: offered {self.offered}, seen {self.seen}, "
            f"taken {self.taken}, done {self.done}, in flight {self.in_flight}, kicks "
            f"{'off' if self.kicks_off else 'on'}"
        )


@dataclass(frozen=True)
class Look:
    """What was seen of a VM in one moment.

    :ivar details: lines, for people: run state, jobs, eventfds, threads, pressure.
    :ivar held: why nothing may be done to the VM to wake it; empty where it may.
    """

    queues: tuple[Queue, ...]
    details: tuple[str, ...]
    held: str = ""

    def verdict(self) -> str:
        """Say what holds the guest."""
        causes = [
            f"queue {queue.number} of {queue.device}: {queue.cause()}"
            for queue in self.queues
            if queue.cause()
        ]
        if self.held:
            causes.insert(0, self.held)
        if not self.queues:
            causes.append("no virtio queue can be looked at")
        return "\n".join(causes) or (
            "every request was answered: an interrupt was lost, or the guest itself hangs"
        )

    def __str__(self) -> str:
        return "\n".join(
            (self.verdict(), *(queue.describe() for queue in self.queues), *self.details)
        )


async def look(monitor: Monitor, pid: int) -> Look:
    """Look at a VM, and touch nothing.

    :param monitor: one that nobody else uses meanwhile.
    :param pid: QEMU's process on this host.
    :raise Error: QEMU's monitor does not answer.
    """
    status = await _ask(monitor, "query-status")
    jobs = await _ask(monitor, "query-jobs")
    said = [f"{job['type']} {job['id']} is {job['status']}" for job in jobs]
    queues: list[Queue] = []
    details = [f"VM: {status['status']}; jobs: {', '.join(map(printable, said)) or 'none'}"]
    try:
        for device in await _ask(monitor, "x-query-virtio"):
            queues += await _queues(monitor, str(device["path"]))
    except Error as error:  # an unstable command, and a guest may change its rings meanwhile
        details.append(f"virtio queues: {error}")
    details.append(f"eventfds (descriptor: count): {_eventfds(pid)}")
    details += threads(pid)
    pressure = Path("/proc/pressure/io")
    if pressure.exists():  # not every kernel tells
        details += [f"pressure on storage: {line}" for line in pressure.read_text().splitlines()]
    held = ""
    if any(job["status"] == "pending" for job in jobs):
        held = "a job is pending, and holds the guest until it is finalized (K5)"
    elif not status["running"]:
        held = f"the VM does not run: {status['status']}"
    return Look(tuple(queues), tuple(details), held)


async def diagnose(monitor: Monitor, pid: int) -> str:
    """Look at a VM whose guest hangs, try what wakes it, and say all that in lines for people.

    Takes some seconds. Never raises for what QEMU does: it stands in what is returned.
    """
    try:
        seen = await look(monitor, pid)
    except (Error, OSError) as error:
        waiting = "\n".join(threads(pid))
        return f"QEMU's monitor does not answer, so that nothing can be told: {error}\n{waiting}"
    text = str(seen)
    if seen.held or not any((queue.offered - queue.taken) & 0xFFFF for queue in seen.queues):
        return text
    return f"{text}\n{await wake(monitor, pid)}"


async def wake(monitor: Monitor, pid: int) -> str:
    """Try what wakes a guest whose requests lie in a ring, one after another; say what did.

    The VM must run and no job may be pending. It is stopped for a moment if nothing else helps.
    """
    before = (await look(monitor, pid)).queues
    if await _moves(monitor, before):
        return "it goes on by itself"
    tried: list[str] = []
    steps: list[tuple[str, Callable[[], Awaitable[object]]]] = [
        (f"a kick of eventfd {fd}", lambda fd=fd: _kick(pid, fd))  # type: ignore[misc]
        for fd, count in reversed(_eventfds(pid).items())
        if not count
    ]
    steps.append(("a turn of polling of the iothreads", lambda: _poll_once(monitor)))
    steps.append(("stop and cont", lambda: _stop_and_cont(monitor)))
    for name, step in steps:
        try:
            await step()
        except (Error, OSError) as error:
            tried.append(f"{name}: {error}")
            continue
        if await _moves(monitor, before):
            return "\n".join((*tried, f"{name} wakes it"))
    return "\n".join((*tried, "no kick, no turn of polling, no stop and cont wakes it"))


async def _ask(monitor: Monitor, command: str, **arguments: object) -> Any:
    try:
        async with asyncio.timeout(_ANSWER):
            return await monitor.execute(command, arguments or None)
    except TimeoutError:
        raise Error(f"no answer to {command} in {_ANSWER:g} s") from None


async def _queues(monitor: Monitor, path: str) -> list[Queue]:
    """Look at every queue of a device.

    How many there are, x-query-virtio-status tells, which makes QEMU 11.1 abort.
    """
    queues = []
    for number in range(_QUEUES):
        try:
            one = await _ask(monitor, "x-query-virtio-queue-status", path=path, queue=number)
        except CommandError:
            break
        if one["vring-desc"]:  # else the guest does not use it
            queues.append(await _queue(monitor, path, number, one))
    return queues


async def _queue(monitor: Monitor, path: str, number: int, one: Mapping[str, Any]) -> Queue:
    _, offered = await _half_words(monitor, one["vring-avail"])
    flags, _ = await _half_words(monitor, one["vring-used"])
    return Queue(
        device=path,
        number=number,
        offered=offered,
        seen=int(one["shadow-avail-idx"]),
        taken=int(one["last-avail-idx"]),
        done=int(one["used-idx"]),
        kicks_off=bool(flags & 1),
        in_flight=int(one["inuse"]),
    )


async def _half_words(monitor: Monitor, address: int) -> tuple[int, int]:
    """Read two 16-bit words of guest RAM: a ring begins with its flags and its index."""
    line = {"command-line": f"xp /2hx {address:#x}"}
    text = str(await _ask(monitor, "human-monitor-command", **line))
    words = re.findall(r"0x([0-9a-f]{4})\b", text.partition(":")[2])
    if len(words) != 2:
        raise Error(f"QEMU does not show the guest's RAM: {printable(text)}")
    return int(words[0], 16), int(words[1], 16)


def _eventfds(pid: int) -> dict[int, int]:
    """Return the count of every eventfd of a process, by its descriptor."""
    counts = {}
    for file in sorted(Path(f"/proc/{pid}/fdinfo").iterdir(), key=lambda file: int(file.name)):
        try:
            match = re.search(r"eventfd-count:\s*([0-9a-f]+)", file.read_text())
        except OSError:  # closed since it was listed
            continue
        if match:
            counts[int(file.name)] = int(match[1], 16)
    return counts


async def _moves(monitor: Monitor, before: tuple[Queue, ...]) -> bool:
    """Whether QEMU takes or answers requests of the queues within a second."""
    deadline = asyncio.get_running_loop().time() + _MOVES
    then = {(queue.device, queue.number): (queue.taken, queue.done) for queue in before}
    while True:
        for device, number in then:
            one = await _ask(monitor, "x-query-virtio-queue-status", path=device, queue=number)
            if then[device, number] != (one["last-avail-idx"], one["used-idx"]):
                return True
        if asyncio.get_running_loop().time() > deadline:
            return False
        await asyncio.sleep(_POLL)


async def _kick(pid: int, fd: int) -> None:
    """Add 1 to an eventfd of another process, as the guest's doorbell does."""
    process = os.pidfd_open(pid)
    try:
        own = _libc.syscall(_PIDFD_GETFD, process, fd, 0)
    finally:
        os.close(process)
    if own < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    try:
        os.write(own, (1).to_bytes(8, "little"))
    finally:
        os.close(own)


async def _poll_once(monitor: Monitor) -> None:
    """Have each iothread poll once: it then looks at all of its queues."""
    before = await _ask(monitor, "query-iothreads")
    for value in (_CLOCK, _POLLING, None):
        for thread in before:
            await _ask(
                monitor,
                "qom-set",
                path=f"/objects/{thread['id']}",
                property="poll-max-ns",
                value=thread["poll-max-ns"] if value is None else value,
            )
        await asyncio.sleep(_POLL)


async def _stop_and_cont(monitor: Monitor) -> None:
    await _ask(monitor, "stop")
    await _ask(monitor, "cont")
