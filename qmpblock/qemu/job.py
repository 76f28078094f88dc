"""Job: one background job of QEMU, followed and steered.

Events wake the follower, queries tell it the truth (style.md): an event may be missed, come
late, or, as BLOCK_JOB_COMPLETED does, mean failure. A job of ours never vanishes before its
verdict was read (`qmpblock.qemu.jobstate`).

Bytes done and total are QEMU's own. What they count differs by version (F12: the
whole disk on 7.2, only what is dirty on 11.1), and a total grows while a guest writes: they
serve to see movement and the remaining distance, not to compare.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from typing import Any

from qmpblock.cancellation import end_is_wanted
from qmpblock.errors import CommandError, JobError, StalledError
from qmpblock.qemu.capabilities import Capabilities
from qmpblock.qemu.feed import Feed
from qmpblock.qemu.jobcourse import Course, Progress, counts
from qmpblock.qemu.jobstate import ENDED, GONE, Verb, allows
from qmpblock.qemu.looks import Looks
from qmpblock.qemu.monitor import Monitor
from qmpblock.sizes import human_size

__all__ = ["Job", "Progress"]

_TICK = 0.25  # seconds between two looks at a job that sends no event
_MOST_MOVES = 4096  # that a job makes which is to end; a quarter of an hour, where all are seen
_RETRY = 2.0  # seconds between attempts to go on after ENOSPC
_MOVING = frozenset(
    {"running", "paused", "ready", "standby"}
)  # at a speed, or for want of room not


class Job(Feed[Progress]):
    """One job. `Disk.stream` and `Disk.commit` yield one; of all, `VM.jobs` tells.

    Async iteration yields `Progress` until the job has ended; how it ended is said on
    leaving the `async with` that yielded it.

    :param looks: which it shares with others that are followed at the same time.
    """

    def __init__(
        self,
        monitor: Monitor,
        id: str,  # noqa: A002 - QMP's word
        type: str,  # noqa: A002 - QMP's word
        looks: Looks | None = None,
    ) -> None:
        super().__init__()
        self.id = id
        self.type = type
        self.completion_asked = False
        self.guest_slowed = False  # by whoever runs the job, for it to catch up
        self.to_catch_up: str | None = None  # what helps it, where that is not as for commits
        self.errors = 0
        self._verdict: str | None = None
        self._operation = "request"  # of what failed last
        self._failed = False
        self._monitor = monitor
        self._looks = looks
        capabilities = Capabilities(monitor.version)
        # Where a concluded stream is deadly, it dismisses itself; its last event is its verdict.
        self._dismisses_itself = type == "stream" and capabilities.concluded_streams_kill
        self._ends_by_us = capabilities.flushes_break_over_ending_jobs
        # Made before the job: its first events come before the start command's reply.
        self._events = monitor.subscribe(
            "JOB_STATUS_CHANGE",
            "BLOCK_JOB_COMPLETED",
            "BLOCK_JOB_CANCELLED",
            "BLOCK_JOB_ERROR",
            "BLOCK_JOB_READY",
            "BLOCK_JOB_PENDING",
            match=lambda event: id in (event["data"].get("id"), event["data"].get("device")),
        )

    def __repr__(self) -> str:
        return f"<Job {self.id} {self.progress.status if self.progress else ''}>"

    # for users

    def complete(self) -> None:
        """Ask for the pivot of an active commit, as soon as the job is ready.

        Returns at once; the pivot is done when the iteration, or the `async with`, ends.
        Idempotent; of no effect on jobs that pivot nothing.
        """
        self.completion_asked = True

    async def pause(self) -> None:
        """Pause; the guest goes on.

        :raise CommandError: it is paused already, or its status does not allow it.
        """
        await self.send("pause")

    async def resume(self) -> None:
        """Go on after `pause`.

        :raise CommandError: it is not paused.
        """
        await self.send("resume")

    async def set_speed(self, speed: int) -> None:
        """Limit the job to `speed` bytes a second from now on; 0 is no limit.

        :raise CommandError: the job's status does not allow it.
        """
        # There is no job-set-speed; this one is not among the deprecated (F12).
        await self._monitor.execute("block-job-set-speed", {"device": self.id, "speed": speed})

    # for what runs the job

    async def start(self, command: str, arguments: Mapping[str, object]) -> None:
        """Start the job, so that it waits for us at its end.

        :raise CommandError: QEMU refused; there is no job.
        """
        await self._monitor.execute(
            command,
            {
                "job-id": self.id,
                **arguments,
                "auto-finalize": False,
                "auto-dismiss": self._dismisses_itself,
            },
        )

    def on_error(self, wanted: str) -> str:
        """Return what QEMU is to do where a request of the job's fails: `wanted`, if it may.

        Where a job must not end at any moment (K34) it stops, for `follow` to cancel it.

        :param wanted: `report`, or `enospc`: wait for room, and report what else there is.
        """
        return "stop" if self._ends_by_us else wanted

    async def look(self) -> dict[str, Any] | None:
        """Return QEMU's record of the job; None if it is gone."""
        for info in await self._monitor.execute("query-jobs"):
            if info["id"] == self.id:
                return dict(info)
        return None

    async def _look_closely(self) -> dict[str, Any] | None:
        """Return QEMU's records of the job, query-block-jobs' over query-jobs'; None if gone.

        The former tells its speed, and whether it waits for room: not asked for where that
        does not matter any more.
        """
        if self._looks is not None:
            return await self._looks.closely(self.id)
        info = await self.look()
        if info is not None and info["status"] in _MOVING:
            for block in await self._monitor.execute("query-block-jobs"):
                if block["device"] == self.id:
                    # len and offset are current-progress and total-progress, a moment later.
                    return {**block, **info}
        return info

    async def follow(self, *, converging: float) -> AsyncIterator[Progress]:
        """Yield what is seen of the job, at each event and four times a second, to its end.

        After ENOSPC it is resumed every two seconds, for ever: whether there is room, only
        writing tells (thin pools, quotas). What stopped by another error is cancelled, when QEMU
        answers: so it does not flush all disks (`on_error`).

        The last one is `concluded`; the job is then still to be dismissed, unless it was a
        stream where QEMU does not survive that (`Capabilities.concluded_streams_kill`).

        :param converging: seconds that the passes of a job that pivots may go without
            becoming smaller, while it is to complete.
        :raise StalledError: it did not move, though it should, for the monitor's stall limit;
            or it does not converge. Paused, or waiting for room, it should where the end is wanted
            of what cannot be broken off (`qmpblock.cancellation.end_is_wanted`).
        :raise JobError: somebody else dismissed it.
        """
        clock = asyncio.get_running_loop().time
        course, retried = Course(clock()), clock()
        while True:
            known = self.errors
            info = await self._look_closely()
            # What came meanwhile may be newer than what the look saw: then there is one more.
            news = self._events.pending()
            for event in news:
                self._take(event)
            now = clock()
            if info is None:
                progress = self._gone()
            else:
                progress = course.add(
                    info,
                    now,
                    completion_asked=self.completion_asked,
                    ending=end_is_wanted(),
                    errors=self.errors,
                    known=known,
                )
            if self._failed and progress.error is not None:
                progress = replace(progress, error=self._why())
            self.show(progress)
            yield progress
            if progress.status == "concluded":
                return
            self._check_moves(progress)
            wanted = self.completion_asked or progress.status == "running"
            if wanted and course.hopeless(now, converging):
                distance = max(progress.remaining, course.distance)
                raise self._diverging(progress, distance, converging)
            if course.failed and not self._failed:
                self._failed = True
                await self.cancel()
            elif course.unexplained or (course.full and now - retried > _RETRY):
                retried = now
                with contextlib.suppress(CommandError):  # it was resumed, or ended, meanwhile
                    await self.send("resume")
            if not news:
                with contextlib.suppress(StalledError):  # no event is no news
                    self._take(await self._events.get(_TICK))

    def _gone(self) -> Progress:
        """Return the end of a job that dismisses itself, as its events told it.

        :raise JobError: it does not.
        """
        if not self._dismisses_itself:
            raise JobError(
                self.id, self.type, "somebody else dismissed it, so that its verdict is lost"
            )
        last = self.progress or Progress("", "", 0, 0)
        return replace(last, status="concluded", phase="ended", eta=None, error=self._verdict)

    def _why(self) -> str:
        """Say by what a job failed that QEMU did not end: it keeps the reason to itself then."""
        # A stream calls all that it does a read.
        what = "request" if self.type == "stream" else self._operation
        return f"I/O error (a {what} failed; this QEMU says no more of it)"

    def _check_moves(self, progress: Progress) -> None:
        if progress.idle > self._monitor.stall:
            raise StalledError(
                f"the job {self.id} ({self.type}) is {progress.status} and has not moved for "
                f"{self._monitor.stall:g} s ({progress.done} of {progress.total} bytes)",
                remedy="look whether its storage hangs, or give a longer --stall",
            )

    def _diverging(self, seen: Progress, distance: int, converging: float) -> StalledError:
        written, copied = human_size(int(seen.written)), human_size(int(seen.rate))
        return StalledError(
            f"the job {self.id} does not converge: the guest writes faster than it "
            f"copies (to be copied anew: {written}/s; copied: {copied}/s); the distance is "
            f"{distance} bytes and has not become smaller for {converging:g} s",
            # QEMU lets the requests that it holds back through before it pivots (F21).
            remedy=self.to_catch_up or self._slower(),
        )

    def _slower(self) -> str:
        """Say what helps a commit to catch up."""
        if self.guest_slowed:
            return (
                "the guest was slowed down, and that did not suffice: let it write less, raise "
                "--speed, or pause the VM while this runs again: a paused guest writes nothing"
            )
        return (
            "let the guest write less, raise --speed, or slow the guest down until the pivot with "
            "--throttle-guest RATE"
        )

    def _take(self, event: Mapping[str, Any]) -> None:
        name, data = event["event"], event["data"]
        if name == "BLOCK_JOB_ERROR":
            self.errors += 1
            self._operation = str(data.get("operation", "request"))
        if name == "BLOCK_JOB_CANCELLED":
            self._verdict = "Operation canceled"
        elif name == "BLOCK_JOB_COMPLETED" and data.get("error") is not None:
            self._verdict = str(data["error"])

    async def complete_now(self) -> None:
        """Have a ready job pivot: QEMU then copies the rest, and waits in `pending`.

        Where a controller that died had asked already, it may be there by now: that is no error.

        :raise CommandError: QEMU refused, and the job is as ready as before, or gone.
        """
        try:
            await self.send("complete")
        except CommandError:
            now = await self.look()
            if now is None or now["status"] in ("ready", "standby"):
                raise

    async def finalize(self) -> None:
        """Let a pending job do what is final."""
        await self.send("finalize")

    async def cancel(self) -> None:
        """Give the job up: nothing final is done. Idempotent; does not wait for the end.

        For a ready mirror or active commit this is the forced cancel: no pivot.
        """
        info = await self.look()
        if info is not None and allows(str(info["status"]), "cancel"):
            try:
                await self.send("cancel")
            except CommandError:
                now = await self.look()
                if now is not None and str(now["status"]) not in ENDED:
                    raise

    async def dismiss(self) -> None:
        """Forget a concluded job. Idempotent."""
        if self._dismisses_itself:
            return
        try:
            await self.send("dismiss")
        except CommandError:
            if await self.look() is not None:
                raise

    async def wait_concluded(self) -> str | None:
        """Wait until the job has concluded, or is gone; return its error, if it has one.

        :raise StalledError: it did not move for the monitor's stall limit; or it moves without
            end, which no job does that has nothing more to do.
        """
        clock = asyncio.get_running_loop().time
        last, moved, moves = None, clock(), 0
        while True:
            info = await self.look()
            if info is None or info["status"] in ("concluded", GONE):
                error = None if info is None else info.get("error")
                return None if error is None else str(error)
            now = (info["status"], *counts(info))
            if now != last:
                last, moved, moves = now, clock(), moves + 1
            if moves > _MOST_MOVES:
                raise StalledError(
                    f"the job {self.id} is to end and does not: it has said {moves} times that it "
                    "is somewhere else",
                    standing="it is still there",
                    remedy="see whether this VM's QEMU is what it should be; then: qmpblock "
                    "recover ADDRESS",
                )
            if clock() - moved > self._monitor.stall:
                raise StalledError(
                    f"the job {self.id} stays {info['status']} for {self._monitor.stall:g} s",
                    standing="it is still there",
                    remedy="look whether its storage hangs; then: qmpblock recover ADDRESS",
                )
            with contextlib.suppress(StalledError):  # no event is no news
                await self._events.get(_TICK)

    def end(self) -> None:
        """Stop listening; iterations end. Idempotent."""
        self._events.close()
        super().end()

    async def send(self, verb: Verb) -> None:
        """Have QEMU apply a verb, but for the speed (`set_speed`).

        :raise CommandError: it does not.
        """
        await self._monitor.execute(f"job-{verb}", {"id": self.id})
