"""The course of a job: how far it is, from one look at it to the next. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qmpblock.qemu.jobstate import ENDED
from qmpblock.speed import WINDOW, Convergence, RateMeter

__all__ = ["Course", "Progress", "counts"]

_BURST = 16 << 20  # bytes that a job may do at once, before it rests to keep within its speed
# What waits for somebody; whatever else it says it should move, also what no QEMU says.
_PATIENT = frozenset({"paused", "standby", "ready", "pending"})
_HALTED = frozenset({"paused", "standby"})


@dataclass(frozen=True)
class Progress:
    """How far a job is, at one moment.

    :ivar status: QEMU's job status.
    :ivar phase: for people: `copying`, `paused`, `waiting for room`, `ready`, `converging`,
        `finishing`, `ended`.
    :ivar done: bytes, as QEMU counts them; also `total`.
    :ivar rate: bytes a second, over the last seconds.
    :ivar eta: seconds to go at that rate; None where that cannot be told.
    :ivar idle: seconds since the job last moved, while it should.
    :ivar lagging: passes in a row that did not become smaller: the guest outruns the job.
    :ivar errors: I/O errors that it has met.
    :ivar error: QEMU's verdict, once `status` is `concluded`; None is success.
    :ivar latency: seconds that requests of the guest's took lately, where a copy holds that, by
        `measure`: on average (`mean`), or all but the slowest in a hundred (`p99`); `limit`: bytes
        a second that it keeps to therefore. Else None, and 0.
    :ivar written: bytes a second that the guest writes meanwhile, which are to be copied, too; 0
        where that is not known.
    :ivar downtime: of a migration, seconds for which the guest will stand, as QEMU expects; None
        while it cannot tell. `throttle`: percent of their time that its CPUs are held.
    """

    status: str
    phase: str
    done: int
    total: int
    rate: float = 0.0
    eta: float | None = None
    idle: float = 0.0
    lagging: int = 0
    errors: int = 0
    error: str | None = None
    latency: float | None = None
    limit: int = 0
    measure: str = "mean"
    downtime: float | None = None
    written: float = 0.0
    throttle: int = 0

    @property
    def remaining(self) -> int:
        """Bytes to go, as QEMU counts them; of a ready job, its distance from the guest."""
        return max(0, self.total - self.done)

    @property
    def ready(self) -> bool:
        """Whether the job has caught up once, so that it can be completed."""
        return self.status in ("ready", "standby")

    @property
    def stalled(self) -> bool:
        """Whether it has not moved for some seconds, though it should."""
        return self.idle >= WINDOW


class Course:
    """How a job comes on.

    :ivar full: whether it waits for room since it met ENOSPC.
    :ivar failed: whether it stands since it met another error.
    :ivar unexplained: whether it stands since it met an error, of which QEMU does not tell any more
        what it was: resumed, it meets it again.
    """

    def __init__(self, now: float) -> None:
        self.full = self.failed = self.unexplained = False
        self._explained = 0  # errors
        self._meter = RateMeter()
        self._growing = RateMeter()  # a total grows by what the guest writes
        self._pace = Convergence()
        self._stage = (False, False)  # whether it has been ready, and whether it is to pivot
        self._last: tuple[str, int, int] | None = None
        self._moved = now

    def add(
        self,
        info: Mapping[str, Any],
        now: float,
        *,
        completion_asked: bool,
        ending: bool,
        errors: int,
        known: int = 0,
    ) -> Progress:
        """Take QEMU's records of a job in, and say how far it is.

        :param ending: whether only what leads to its end counts as a move.
        :param known: how many of its errors were known before QEMU was asked for these.
        """
        status, done, total = str(info["status"]), *counts(info)
        self._judge(info, status in _HALTED, known)
        working = status not in _PATIENT or (status == "ready" and completion_asked)
        # A job that is resumed, and finds no room again, has moved; but not to its end.
        step = ("", done, 0) if ending else (status, done, total)
        if step != self._last or not (working or ending):
            self._last, self._moved = step, now
        self._meter.add(now, done)
        self._growing.add(now, total)
        # How the guest did before it was to pivot says nothing. Once ready it stays so: a drain,
        # of a map of ours say, has it stand by for a moment.
        stage = status == "ready" or self._stage[0], completion_asked
        if stage != self._stage:
            self._stage, self._pace = stage, Convergence()
        if status in ("running", "ready"):
            self._pace.add(now, max(0, total - done), total)
        rate, written = self._meter.rate, self._growing.rate
        return Progress(
            status=status,
            phase=_phase(status, full=self.full, asked=completion_asked),
            done=done,
            total=total,
            rate=rate,
            eta=(total - done) / (rate - written)
            if rate > written and status == "running"
            else None,
            idle=max(0.0, now - self._moved - _rest(info)),
            lagging=self._pace.passes,
            errors=errors,
            error=None if info.get("error") is None else str(info["error"]),
            written=written,
        )

    def _judge(self, info: Mapping[str, Any], halted: bool, known: int) -> None:
        """See by what a job stands.

        `cont` of the VM resets the job's io-status, and leaves the job paused: so once full, full
        until it runs; and what nobody has looked at until then is not known any more.
        """
        said = info.get("io-status", "ok")
        self.failed = halted and said == "failed"
        self.full = halted and (self.full or said == "nospace")
        if said != "ok" or not (halted or info.get("paused", False)):
            self._explained = known
        self.unexplained = halted and not self.full and known > self._explained

    @property
    def distance(self) -> int:
        """How far it was behind the guest at best, in bytes."""
        return self._pace.distance

    def hopeless(self, now: float, converging: float) -> bool:
        """Whether its passes have not become smaller for so many seconds."""
        return self._pace.hopeless(now, converging)


def counts(info: Mapping[str, Any]) -> tuple[int, int]:
    """Return bytes done and total; what is no number counts as none: QEMU is not trusted."""
    counts = []
    for key in ("current-progress", "total-progress"):
        value = info.get(key)
        counts.append(value if isinstance(value, int) and value >= 0 else 0)
    return counts[0], counts[1]


def _rest(info: Mapping[str, Any]) -> float:
    """Return for how many seconds a job may rest to keep within its speed."""
    speed = info.get("speed")
    return _BURST / speed if isinstance(speed, int) and speed > 0 else 0.0


def _phase(status: str, *, full: bool, asked: bool) -> str:
    if full:
        return "waiting for room"
    if status in ("paused", "standby"):
        return "paused"
    if status == "ready":
        return "converging" if asked else "ready"
    if status in ("waiting", "pending"):
        return "finishing"
    return "ended" if status in ENDED else "copying"
