"""Steering: the verbs of `qmpblock job`, on jobs of ours from another process.

A foreign job is shown and never touched. A job of ours has a controller that does what must
be done before its end, so that two verbs are not simply passed on: were a pivot completed
whose controller is dead, it would wait to be finalized, and the guest with it (K5); and a
stream that is finalized without a flush can lose data (K6).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from qmpblock.changes.leftovers import record_of
from qmpblock.changes.step import Choice
from qmpblock.errors import (
    UNTOUCHED,
    BusyError,
    NotFoundError,
    RecordError,
    RequestError,
    printable,
)
from qmpblock.graph.model import JobInfo
from qmpblock.names import LockKind, is_pivot, lock_kind, paused_node
from qmpblock.qemu import lock, ownership, polling
from qmpblock.qemu.job import Job
from qmpblock.qemu.jobstate import VERBS, Verb, allows
from qmpblock.qemu.lock import Holder
from qmpblock.recovery import recover

if TYPE_CHECKING:
    from qmpblock.changes.record import Record
    from qmpblock.qemu.connection import Connection

__all__ = ["Steering", "find_job", "holder_of", "steer"]

#: The verbs of `qmpblock job`.
Steering = Literal["pause", "resume", "cancel", "complete", "finalize", "dismiss", "speed"]


async def find_job(vm: Connection, name: str) -> JobInfo:
    """Find a job by its id.

    :raise NotFoundError: there is none; lists those that there are.
    """
    jobs = (await vm.graph()).jobs
    for job in jobs:
        if job.id == name:
            return job
    listed = [f"{job.id} ({job.type}, {job.status})" for job in jobs]
    raise NotFoundError(
        f"this VM has no job {printable(name)}" + ("; it has:" if listed else ", nor any other"),
        listed,
    )


async def holder_of(vm: Connection, job: JobInfo) -> Holder | None:
    """Return the controller of a job of ours, dead or alive; None if nothing tells.

    :raise RecordError: a lock that may be that controller's cannot be read.
    """
    unread: RecordError | None = None
    disks = await lock.holders(vm.monitor, lambda name: lock_kind(name) is LockKind.DISK)
    for name, holder in disks.items():
        try:
            if isinstance(holder, str):
                raise lock.unreadable(name, holder)
            record = record_of(holder, name)
        except RecordError as error:
            unread = error
            continue
        if record and job.id in (record.job, *record.helpers):
            return holder
    if unread is not None:
        raise unread
    return None


async def steer(vm: Connection, name: str, verb: Steering, speed: int = 0) -> str:
    """Apply a verb to a job of ours; return what was done, in a sentence.

    :param speed: bytes a second, of `speed`; 0 is no limit.
    :raise NotFoundError: there is no such job.
    :raise RequestError: it is not ours, or its status does not allow the verb.
    :raise BusyError: its controller does that by itself.
    :raise RecordError: who its controller is cannot be read.
    """
    job = await find_job(vm, name)
    if not job.ours:
        raise RequestError(
            f"the job {printable(name)} is not one of ours",
            standing=UNTOUCHED,
            remedy="whoever started it can steer it",
        )
    qemus: Verb = "set-speed" if verb == "speed" else verb
    if not allows(job.status, qemus):
        raise RequestError(
            f"the job {name} is {printable(job.status)}, and {verb} takes one that is "
            f"{' or '.join(sorted(VERBS[qemus]))}",
            standing=UNTOUCHED,
        )
    if verb not in ("pause", "cancel"):  # which keep a job from writing where it should not
        await ownership.ask(vm.monitor)
    if verb in ("complete", "finalize", "dismiss"):
        holder = await holder_of(vm, job)
        if holder is not None and not holder.is_dead():
            if verb != "complete" or not _may_be_asked_to_pivot(record_of(holder), job):
                raise BusyError(
                    f"the controller of {name} does that by itself: {holder}",
                    standing=UNTOUCHED,
                    remedy="wait for it; if it hangs, kill it, then: qmpblock recover ADDRESS",
                )
        elif holder is not None or is_pivot(job.id):
            choice = Choice.UNDO if verb == "dismiss" else Choice.CONTINUE
            await recover(vm, choice)
            return f"the controller of {name} had died; what it left was brought to its end"
    async with polling.unpolled(vm.monitor):
        return await _apply(vm, job, verb, speed)


def _may_be_asked_to_pivot(record: Record | None, job: JobInfo) -> bool:
    """Whether a living controller sees to the rest, where its job is asked to pivot from outside.

    It does of the job that its change is about. A mirror of a copy would hold the guest at a moment
    that nobody waits for, or take it to a copy that it is not to be on.
    """
    if record is None or job.id != record.job:
        return False
    return paused_node(record.run) not in record.nodes  # it has to pause the VM before (K26)


async def _apply(vm: Connection, job: JobInfo, verb: Steering, speed: int) -> str:
    name = job.id
    qemu = Job(vm.monitor, name, job.type)
    try:
        if verb == "speed":
            await qemu.set_speed(speed)
            return (
                f"{name} runs at {speed} bytes a second at most" if speed else f"{name}: no limit"
            )
        await qemu.send(verb)
    finally:
        qemu.end()
    return f"{verb}: {name}"
