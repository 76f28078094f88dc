"""How fast a copy may go, for the guest's own requests not to take longer than is wanted. Pure.

Measured is what QEMU counts for each disk, since it began, as it does anyway: requests of the
guest's, and the time that they took, reads and writes apart. Between two looks that is a mean, of
the very requests that were slow or quick, and nothing has to be set in the VM, nor taken back.
Where somebody has set latency histograms, which are one for all who look at them, they tell more:
how long the slowest but one in a hundred took; then that is held. We set none: see K30.
What counts is the worst of all disks, of reads or writes.

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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

__all__ = ["FLOOR", "Counted", "GuestLatency", "Measure", "Pacer", "worst_mean", "worst_tail"]

Measure = Literal["mean", "p99"]

FLOOR = 1 << 20
"""Bytes a second, of all disks together, below which no guest slows a copy down."""

_START = 8 << 20  # bytes a second that it begins with
_WINDOW = 1.0  # seconds over which the copy's speed is taken
#: Requests that make a measure; of fewer, those of so many seconds.
_ENOUGH: Mapping[Measure, tuple[int, float]] = {"mean": (8, _WINDOW), "p99": (100, 4.0)}
_SLOW = 100  # requests, of which one may take longer
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
    """What QEMU has counted of one kind of requests of one disk's: all of it only ever grows.

    :ivar seconds: that all of them took together.
    :ivar edges: seconds, between the bins of the latency histogram that somebody has set; empty
        where nobody has.
    :ivar bins: how many took so long: one more than edges.
    """

    requests: int
    seconds: float
    edges: tuple[float, ...] = ()
    bins: tuple[int, ...] = ()

    def tells(self, wanted: float) -> bool:
        """Whether the histogram tells of a request whether it took longer than that."""
        return len(self.edges) > 1 and self.edges[0] <= wanted < self.edges[-1]


@dataclass(frozen=True)
class GuestLatency:
    """How the guest fared while a copy held its latency.

    :ivar wanted: seconds that its requests were to take at most.
    :ivar mean: seconds that they took, over the whole copy, on the worst disk, of reads or writes;
        None where there were none.
    :ivar longest: the highest that was seen at one look, of what was held.
    :ivar above: the share of the looks at which it was above what is wanted, from 0 to 1.
    :ivar slowest: bytes a second that the copy was kept to at the least.
    :ivar measure: what was held: the `mean`, or `p99`: that 99 of 100 requests take no longer.
    :ivar p99: seconds within which 99 of 100 of its requests ended, likewise, by the bins of QEMU's
        histograms, so at most; where more are beyond the last boundary, that. None where it was
        not `p99` that was held, or there were no requests.
    """

    wanted: float
    mean: float | None = None
    longest: float | None = None
    above: float = 0.0
    slowest: int = 0
    measure: Measure = "mean"
    p99: float | None = None


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


def worst_tail(
    before: Mapping[str, Counted], now: Mapping[str, Counted]
) -> tuple[int, float | None]:
    """Return how many requests ended between two looks, and the longest of all but one in 100.

    By the bins: the upper edge of that in which the request lies, so it took no longer; the last
    edge where it lies beyond. One may be slow, of however few. What is not in both, or has other
    bins, or fewer in them, does not count.
    """
    tails, requests = [], 0
    for kind, counted in now.items():
        was = before.get(kind)
        if was is None or was.edges != counted.edges:
            continue
        new = [after - then for after, then in zip(counted.bins, was.bins, strict=True)]
        if not any(new) or min(new) < 0:
            continue
        requests += sum(new)
        tails.append(_tail(counted.edges, new))
    return requests, max(tails, default=None)


def _tail(edges: tuple[float, ...], bins: Sequence[int]) -> float:
    left = max(1, sum(bins) // _SLOW)  # that may be slower
    for edge, requests in zip((edges[-1], *reversed(edges)), reversed(bins), strict=True):
        left -= requests
        if left < 0:
            return edge
    return edges[0]


class Pacer:
    """Says how fast a copy may go.

    :ivar limit: bytes a second by now.
    :ivar latency: the guest's, in seconds, at the last look that told; None while none did.
    :ivar measure: what that is.
    """

    def __init__(self, wanted: float, ceiling: int = 0) -> None:
        """Begin.

        :param wanted: seconds that the guest's requests are to take at most: 99 of 100 where every
            histogram tells of it, else on average.
        :param ceiling: bytes a second that the copy never exceeds; 0 is no limit.
        """
        self.wanted = wanted
        self.latency: float | None = None
        self.measure: Measure = "mean"
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
        measure = self._measured_by(counted)
        if self._base is None or self.measure != measure:
            self._first, self._base = counted, None
            self._looks, self._above, self._longest = 0, 0, None
        self.measure = measure
        if self._base is None or now < self._settled:
            self._begin(now, counted, done)
        else:
            since, before, _ = self._base
            requests, felt = self._felt(before, counted)
            enough, window = _ENOUGH[measure]
            if felt is None:
                self._be_silent(now, counted, done)
            elif requests >= enough or now - since >= window or self._is_lost(felt):
                self._begin(now, counted, done)
                self._feel(now, felt)
        self._keep_within(ceiling)
        return self.limit

    @property
    def outcome(self) -> GuestLatency:
        """How the guest fared by now."""
        _, mean = worst_mean(self._first, self._last)
        p99 = self._felt(self._first, self._last)[1] if self.measure == "p99" else None
        above = self._above / self._looks if self._looks else 0.0
        seen = self._longest, above, self._slowest
        return GuestLatency(self.wanted, mean, *seen, self.measure, p99)

    def _measured_by(self, counted: Mapping[str, Counted]) -> Measure:
        tells = [one.tells(self.wanted) for one in counted.values()]
        return "p99" if tells and all(tells) else "mean"

    def _felt(
        self, before: Mapping[str, Counted], now: Mapping[str, Counted]
    ) -> tuple[int, float | None]:
        return (worst_tail if self.measure == "p99" else worst_mean)(before, now)

    def _is_lost(self, felt: float) -> bool:
        """Whether what is still to come of a window can make it no better."""
        return self.measure == "p99" and felt > self.wanted

    def _begin(self, now: float, counted: Mapping[str, Counted], done: int) -> None:
        self._base = now, counted, done
        self._silent = now

    def _be_silent(self, now: float, counted: Mapping[str, Counted], done: int) -> None:
        if now - self._silent >= _SILENCE:
            self._base = now, counted, done  # and silent since when it was
            self.latency = None
            self._raise()

    def _feel(self, now: float, felt: float) -> None:
        self.latency = felt
        self._looks += 1
        self._longest = max(felt, self._longest or 0.0)
        if felt > self.wanted:
            self._above += 1
            self._settled = now + _SETTLE
            self._lower(felt)
        elif felt < self.wanted * _CALM:
            self._raise()

    def _lower(self, felt: float) -> None:
        # A limit that the copy does not reach is none that a guest would feel the fall of.
        used = self.limit if self._rate() * 2 > self.limit else max(self._rate(), FLOOR)
        self._bad = used
        self.limit = int(used * min(max(self.wanted / felt, _LEAST), _MOST))

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
