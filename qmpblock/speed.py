"""Speed: how fast a job goes, and whether it will ever catch up with the guest.

Pure, but for `Speed.wait`.
"""

from __future__ import annotations

import asyncio
from collections import deque

__all__ = ["Convergence", "RateMeter", "Speed"]

WINDOW = 5.0
"""Seconds over which a rate is taken."""

_PASSES = 3
_SMALLER = 0.95
_LAST = 1 << 20  # bytes: the last cluster or two, of the largest kind that is in use
_LAST_PATIENCE = 4


class RateMeter:
    """Bytes a second over the last seconds, from (time, bytes) samples."""

    def __init__(self, window: float = WINDOW) -> None:
        self._window = window
        self._samples: deque[tuple[float, int]] = deque()

    def add(self, time: float, done: int) -> None:
        """Add a sample; one that goes back (a job began anew) restarts the measurement."""
        if self._samples and done < self._samples[-1][1]:
            self._samples.clear()
        self._samples.append((time, done))
        while len(self._samples) > 2 and time - self._samples[0][0] > self._window:
            self._samples.popleft()

    @property
    def rate(self) -> float:
        """Bytes a second; 0 while nothing can be told."""
        if len(self._samples) < 2:
            return 0.0
        (first, start), (last, stop) = self._samples[0], self._samples[-1]
        return (stop - start) / (last - first) if last > first else 0.0


class Convergence:
    r"""Whether the passes of a mirroring job become smaller.

    Such a job copies all that is dirty, by when the guest has dirtied more, and so on. What
    remains therefore falls during a pass and jumps up at its end (measured: 17.1, 3.7, 15.9,
    2.5, 15.9 MB): the height of the jumps tells, not a single look::

        remaining |\    |\    |\          |\
                  | \   | \   | \         | \   |\
                  |  \  |  \  |  \        |  \  | \  |\
                  |   \_|   \_|   \_      |   \_|  \_| \_
                  never gets there         converges

    A job that has a speed rests when it has copied what it knew to be dirty, and sees nothing of
    what the guest writes meanwhile: nothing remains at any look, for ever. Then the height of the
    jumps is by how much the whole has grown.
    """

    def __init__(self) -> None:
        self._last: int | None = None
        self._whole = 0
        self._peak: int | None = None
        self._since = 0.0
        self.passes = 0  # in a row that were no smaller than the smallest

    @property
    def distance(self) -> int:
        """How high the smallest pass was that was seen by now, in bytes."""
        return self._peak or 0

    def add(self, time: float, remaining: int, whole: int = 0) -> None:
        """Take a look at `time` seconds.

        :param remaining: bytes; `whole`: with those that were copied.
        """
        height = remaining
        if self._last == 0 and whole > self._whole > 0:
            height = max(remaining, whole - self._whole)
        if self._last is not None and height > self._last:
            if self._peak is None or height < self._peak * _SMALLER:
                self._peak, self._since, self.passes = height, time, 0
            else:
                self.passes += 1
        self._last, self._whole = remaining, whole

    def hopeless(self, time: float, limit: float) -> bool:
        """Whether the passes have not become smaller for `limit` seconds.

        The last cluster or two cannot become smaller, only none: whether none is dirty at the
        moment that counts is chance then, and needs time. So the limit is four times as long.
        """
        if self._peak is not None and self._peak <= _LAST:
            limit *= _LAST_PATIENCE
        return self.passes >= _PASSES and time - self._since > limit


class Speed:
    """A rate limit that can be changed while it is in use.

    A token bucket: what was not used for a fifth of a second may be used at once.

    :ivar rate: bytes a second; 0 is no limit. A change counts at once, also for who waits.
    """

    _BURST = 0.2  # seconds

    def __init__(self, rate: int = 0) -> None:
        self._rate = rate
        self._free = 0.0  # when what was taken so far is paid for

    @property
    def rate(self) -> int:
        """Bytes a second; 0 is no limit."""
        return self._rate

    @rate.setter
    def rate(self, rate: int) -> None:
        self._rate = rate
        self._free = 0.0  # what was taken at another rate is forgiven

    def piece(self, largest: int, smallest: int = 64 << 10) -> int:
        """Return how many bytes to take at once: a quarter of a second's, within bounds."""
        if self._rate <= 0:
            return largest
        return min(largest, max(smallest, self._rate // 4))

    async def wait(self, length: int) -> None:
        """Take `length` bytes, and wait until they may be used."""
        loop = asyncio.get_running_loop()
        rate, now = self._rate, loop.time()
        until = now + self.take(now, length)
        while until > now and self._rate == rate:
            await asyncio.sleep(min(until - now, self._BURST))
            now = loop.time()

    def take(self, now: float, length: int) -> float:
        """Take `length` bytes at `now`; return how many seconds to wait before using them."""
        if self.rate <= 0:
            self._free = now
            return 0.0
        begin = max(self._free, now - self._BURST)
        self._free = begin + length / self.rate
        return max(0.0, begin - now)
