"""Course: what happened when in one migration, collected while it happens. Pure.

Whoever migrates tells it, with the time by a clock of his own; what it returns is in seconds since
the beginning.
"""

from __future__ import annotations

from dataclasses import dataclass

from qmpblock.migration.states import Phase

__all__ = ["Course", "MemoryPass", "MirrorCourse", "PhaseTime"]

_MOST = 128  # moments that are kept of a mirror, however long it takes


@dataclass(frozen=True)
class PhaseTime:
    """How long one phase took.

    :ivar phase: its name.
    :ivar seconds: until the next one began, or until all was cleaned up.
    :ivar bytes: that went over the wires meanwhile, of disks and memory, as QEMU counts them.
    :ivar rate: bytes a second.
    """

    phase: str
    seconds: float
    bytes: int = 0
    rate: float = 0.0


@dataclass(frozen=True)
class MemoryPass:
    """One pass over the memory: the first over all of it, the others over what was written since.

    :ivar number: as QEMU counts them, from 1.
    :ivar began: seconds from the beginning of the migration; `seconds`: until the next one began,
        or all was sent.
    :ivar left: bytes that were to be sent as it was first looked at.
    :ivar sent: bytes that were sent; `rate`: a second.
    """

    number: int
    began: float
    seconds: float
    left: int
    sent: int
    rate: float


@dataclass(frozen=True)
class MirrorCourse:
    """How far one disk was, and when.

    :ivar began: seconds from the beginning of the migration.
    :ivar seconds: until it was as far as the guest; `rate`: bytes a second until then.
    :ivar moments: (seconds from the beginning of the migration, bytes that were copied by then),
        128 at most.
    """

    began: float = 0.0
    seconds: float = 0.0
    rate: float = 0.0
    moments: tuple[tuple[float, int], ...] = ()


class Course:
    """Collects it.

    :param now: when the migration began.
    :ivar stopped: when it was heard that the guest stands; `resumed`: that it runs at the
        destination. In seconds from the beginning; None: it was not heard.
    """

    def __init__(self, now: float) -> None:
        self.stopped: float | None = None
        self.resumed: float | None = None
        self._began = now
        self._phases: list[tuple[Phase, float, int]] = [(Phase.CHECKED, now, 0)]
        self._mirrors: dict[str, _Mirror] = {}
        self._passes: list[_Pass] = []
        self._sent = 0
        self._ended: float | None = None  # the last look at memory that is on its way

    # -- what it is told

    def enter(self, now: float, phase: Phase) -> None:
        """Take down that a phase begins."""
        self._phases.append((phase, now, self._moved))

    def mirrored(self, now: float, mirror: str, done: int, *, ready: bool) -> None:
        """Take down how far a mirror is, in bytes; the first time, that it has begun."""
        self._mirrors.setdefault(mirror, _Mirror(now, done)).add(now, done, ready=ready)

    def passes_on(self, now: float, number: int) -> None:
        """Take down that a pass over the memory begins, the one of that number, from 1."""
        if number and (not self._passes or number > self._passes[-1].number):
            self._passes.append(_Pass(number, now, self._sent))

    def sent(self, now: float, bytes_sent: int, left: int, number: int) -> None:
        """Take down how much of the memory was sent.

        :param left: bytes to go; `number`: of the pass; 0: none has begun.
        """
        self._sent = max(self._sent, bytes_sent)
        self.passes_on(now, number)
        if self._passes and self._passes[-1].left is None:
            self._passes[-1].left = left
        self._ended = now

    def stops(self, now: float) -> None:
        """Take down that it was heard that the guest stands."""
        self.stopped = now - self._began

    def resumes(self, now: float) -> None:
        """Take down that it was heard that the guest runs at the destination."""
        self.resumed = now - self._began

    # -- what it came to

    def since(self, now: float) -> float:
        """Return how many seconds after the beginning that is."""
        return now - self._began

    @property
    def _moved(self) -> int:
        return self._sent + sum(one.done for one in self._mirrors.values())

    @property
    def longest_stall(self) -> float:
        """Seconds for which the guest stood, as heard here: more than it felt; 0: not heard."""
        if self.stopped is None or self.resumed is None:
            return 0.0
        return max(0.0, self.resumed - self.stopped)

    @property
    def stood_before(self) -> float:
        """Seconds for which the guest stood before the source held it; 0: not heard."""
        began = {phase: when - self._began for phase, when, _ in self._phases}
        if self.stopped is None or Phase.HELD not in began:
            return 0.0
        return max(0.0, began[Phase.HELD] - self.stopped)

    def phases(self, now: float) -> tuple[PhaseTime, ...]:
        """Return what each phase took, the last one until now."""
        ends = [*self._phases[1:], (Phase.HANDED, now, self._moved)]
        return tuple(
            PhaseTime(phase.value, end - began, moved - before, _rate(moved - before, end - began))
            for (phase, began, before), (_, end, moved) in zip(self._phases, ends, strict=True)
        )

    def mirror(self, name: str) -> MirrorCourse:
        """Return the course of a mirror; empty where nothing was heard of it."""
        one = self._mirrors.get(name)
        if one is None:
            return MirrorCourse()
        until, done = one.ready or one.moments[-1]
        moments = tuple((when - self._began, done) for when, done in one.moments)
        took = until - one.began
        return MirrorCourse(one.began - self._began, took, _rate(done, took), moments)

    def passes(self) -> tuple[MemoryPass, ...]:
        """Return the passes over the memory, as far as they were seen."""
        if not self._passes or self._ended is None:
            return ()
        ends = [(one.began, one.before) for one in self._passes[1:]] + [(self._ended, self._sent)]
        return tuple(
            MemoryPass(
                one.number,
                one.began - self._began,
                end - one.began,
                one.left or 0,
                sent - one.before,
                _rate(sent - one.before, end - one.began),
            )
            for one, (end, sent) in zip(self._passes, ends, strict=True)
        )


@dataclass
class _Pass:
    number: int
    began: float
    before: int  # bytes that were sent before it
    left: int | None = None


class _Mirror:
    def __init__(self, now: float, done: int) -> None:
        self.began = now
        self.done = done
        self.ready: tuple[float, int] | None = None
        self.moments: list[tuple[float, int]] = []
        self._apart = 0.0  # seconds that moments are apart at least

    def add(self, now: float, done: int, *, ready: bool) -> None:
        self.done = max(self.done, done)
        if ready and self.ready is None:
            self.ready = now, self.done
        if len(self.moments) > 1 and now - self.moments[-2][0] < self._apart:
            self.moments[-1] = now, self.done
            return
        self.moments.append((now, self.done))
        if len(self.moments) >= _MOST:
            self._apart = 2 * (now - self.began) / _MOST
            self.moments = [*self.moments[:-1:2], self.moments[-1]]


def _rate(moved: int, seconds: float) -> float:
    return moved / seconds if seconds > 0 else 0.0
