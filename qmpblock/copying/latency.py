"""How fast a copy may go, for the guest's own requests not to take longer than is wanted. Pure.

Measured is what QEMU counts for each disk, since it began, as it does anyway: requests of the
guest's, and the time that they took, reads and writes apart. Between two looks that is a mean, of
the very requests that were slow or quick, and nothing has to be set in the VM, nor taken back.
(QEMU's latency histograms tell a percentile, but in bins as wide as what is to be held, and they
are one for all who would look at them.) What counts is the worst of all disks, of reads or writes.

What the copy may do follows it, as a TCP sender does what its network drops::

    speed |         bad        bad
          |        /|         _/|        too slow for the guest: less, the more it is above
          |      _/ |      __/  | ____   well below what is wanted: more; the nearer to what was
          |    _/   |    _/     |/       too much the last time, the smaller the steps
          |  _/     |  _/                in between: as it is
          | /       |_/                  floor: below that it never goes
          +--------------------------- time

It begins slowly, so that a guest does not suffer before the first look. A guest that does nothing
has nothing to suffer, but not at once: one whose requests hang has none that ended, either.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["FLOOR", "Counted", "GuestLatency", "Pacer", "worst_mean"]

FLOOR = 1 << 20
"""Bytes a second, of all disks together, below which no guest slows a copy down."""

_START = 8 << 20  # bytes a second that it begins with
_ENOUGH = 8  # requests that make a mean; of fewer, those of a second
_WINDOW = 1.0  # seconds over which a mean is taken at most
_SETTLE = 0.3  # seconds after a change downwards: requests of before it end
_SILENCE = 2.0  # seconds without a request, after which there is nobody to suffer
_CALM = 0.7  # of the wanted latency, below which it may go faster
_LEAST, _MOST = 0.2, 0.8  # of its speed, that are left by one step down
_FAST, _CAREFUL = 1.6, 0.05  # up: a factor; a share of the speed that was too much
_NEAR = 0.6  # of that speed, from where on it is careful
_FORGET = 1.3  # times that speed: it is none to be careful of any more
_LARGEST = 1 << 62  # bytes a second: no limit


@dataclass(frozen=True)
class Counted:
    """What QEMU has counted of one kind of requests of one disk's: both only ever grow.

    :ivar seconds: that all of them took together.
    """

    requests: int
    seconds: float


@dataclass(frozen=True)
class GuestLatency:
    """How the guest fared while a copy held its latency.

    :ivar wanted: seconds that its requests were to take at most, on average.
    :ivar mean: seconds that they took, over the whole copy, on the worst disk, of reads or writes;
        None where there were none.
    :ivar longest: the highest mean that was seen at one look.
    :ivar above: the share of the looks at which it was above what is wanted, from 0 to 1.
    :ivar slowest: bytes a second that the copy was kept to at the least.
    """

    wanted: float
    mean: float | None = None
    longest: float | None = None
    above: float = 0.0
    slowest: int = 0


def worst_mean(
    before: Mapping[str, Counted], now: Mapping[str, Counted]
) -> tuple[int, float | None]:
    """Return how many requests ended between two looks, and the highest mean of any kind's.

    What is not in both, or has fallen, is of another disk: it does not count.
    """
    means, requests = [], 0
    for kind, counted in now.items():
        was = before.get(kind)
        if was is not None and counted.requests > was.requests:
            requests += counted.requests - was.requests
            took = (counted.seconds - was.seconds) / (counted.requests - was.requests)
            means.append(max(0.0, took))
    return requests, max(means, default=None)


class Pacer:
    """Says how fast a copy may go.

    :ivar limit: bytes a second by now.
    :ivar latency: the guest's, in seconds, at the last look that told; None while none did.
    """

    def __init__(self, wanted: float, ceiling: int = 0) -> None:
        """Begin.

        :param wanted: seconds that the guest's requests are to take at most, on average.
        :param ceiling: bytes a second that the copy never exceeds; 0 is no limit.
        """
        self.wanted = wanted
        self.latency: float | None = None
        self.limit = min(_START, ceiling or _LARGEST)
        self._bad: float | None = None  # the speed that was too much the last time
        self._base: tuple[float, Mapping[str, Counted], int] | None = None
        self._first: Mapping[str, Counted] = {}
        self._last: Mapping[str, Counted] = {}
        self._course: deque[tuple[float, int]] = deque()  # times, with bytes done
        self._settled = 0.0
        self._silent = 0.0
        self._looks = self._above = 0
        self._longest: float | None = None
        self._slowest = self.limit

    def look(self, now: float, counted: Mapping[str, Counted], done: int, ceiling: int) -> int:
        """Take a look at `now` seconds, some times a second, and return the new `limit`.

        :param counted: by disk and kind.
        :param done: bytes that the copy has done.
        :param ceiling: bytes a second that it must not exceed; 0 is no limit.
        """
        self._course.append((now, done))
        while now - self._course[0][0] > _WINDOW:
            self._course.popleft()
        self._last = counted
        if self._base is None:
            self._first = counted
        if self._base is None or now < self._settled:
            self._begin(now, counted, done)
        else:
            since, before, _ = self._base
            requests, mean = worst_mean(before, counted)
            if mean is None:
                self._be_silent(now, counted, done)
            elif requests >= _ENOUGH or now - since >= _WINDOW:
                self._begin(now, counted, done)
                self._feel(now, mean)
        self._keep_within(ceiling)
        return self.limit

    @property
    def outcome(self) -> GuestLatency:
        """How the guest fared by now."""
        _, mean = worst_mean(self._first, self._last)
        above = self._above / self._looks if self._looks else 0.0
        return GuestLatency(self.wanted, mean, self._longest, above, self._slowest)

    def _begin(self, now: float, counted: Mapping[str, Counted], done: int) -> None:
        self._base = now, counted, done
        self._silent = now

    def _be_silent(self, now: float, counted: Mapping[str, Counted], done: int) -> None:
        if now - self._silent >= _SILENCE:
            self._base = now, counted, done  # and silent since when it was
            self.latency = None
            self._raise()

    def _feel(self, now: float, mean: float) -> None:
        self.latency = mean
        self._looks += 1
        self._longest = max(mean, self._longest or 0.0)
        if mean > self.wanted:
            self._above += 1
            self._settled = now + _SETTLE
            self._lower(mean)
        elif mean < self.wanted * _CALM:
            self._raise()

    def _lower(self, mean: float) -> None:
        # A limit that the copy does not reach is none that a guest would feel the fall of.
        used = self.limit if self._rate() * 2 > self.limit else max(self._rate(), FLOOR)
        self._bad = used
        self.limit = int(used * min(max(self.wanted / mean, _LEAST), _MOST))

    def _raise(self) -> None:
        if self._rate() * 2 < self.limit and self.limit > _START:
            return  # what it is kept to is not what keeps it
        if self._bad is not None and self.limit > self._bad * _FORGET:
            self._bad = None
        if self._bad is None or self.limit < self._bad * _NEAR:
            self.limit = int(self.limit * _FAST)
        else:
            self.limit += int(self._bad * _CAREFUL)

    def _rate(self) -> float:
        (first, start), (last, stop) = self._course[0], self._course[-1]
        return (stop - start) / (last - first) if last > first else float(self.limit)

    def _keep_within(self, ceiling: int) -> None:
        most = ceiling or _LARGEST
        self.limit = min(max(self.limit, min(FLOOR, most)), most)
        self._slowest = min(self._slowest, self.limit)
