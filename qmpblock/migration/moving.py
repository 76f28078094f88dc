"""Moving: how far the memory is, when it will be there, and whether ever. Pure.

By what query-migrate says, look after look. What the guest writes meanwhile QEMU tells from the
second pass on; before, nothing is known of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from qmpblock.errors import StalledError
from qmpblock.migration.means import LONGEST_LIMIT
from qmpblock.migration.predict import until_fits
from qmpblock.qemu.job import Progress
from qmpblock.sizes import human_size
from qmpblock.speed import Convergence, RateMeter

__all__ = ["PASSES", "Moving", "count"]

PASSES = "dirty-sync-count"
_TELLING = 2  # the pass from which on QEMU measures what it expects
_PAGE = 4096  # bytes, where QEMU does not say
_ROOM = 1.5  # a limit that is to suffice is longer than what was seen by so much


class Moving:
    """The memory of one migration, on its way. `add` each look.

    :param limit: seconds that the guest may stand for the last of it; 0: not known.
    """

    def __init__(self, limit: float = 0.0) -> None:
        self._limit = limit
        self._meter = RateMeter()
        self._convergence = Convergence()
        self._moved = (-1, 0.0)
        self._now = 0.0
        self._first: int | None = None
        self._measured = False
        self._outrun: float | None = None  # since when more is written than sent
        self._throttle = 0
        self._seen = Progress("", "", 0, 0)

    def add(self, now: float, migration: Mapping[str, Any]) -> Progress:
        """Take a look at `now` seconds; return how far it is."""
        ram = migration.get("ram", {})
        sent, left, total = (count(ram, name) for name in ("transferred", "remaining", "total"))
        number = count(ram, PASSES)
        self._now = now
        if sent != self._moved[0]:
            self._moved = sent, now
        throttle = count(migration, "cpu-throttle-percentage")
        if throttle > self._throttle:  # how it went with a faster guest says nothing any more
            self._throttle, self._convergence, self._outrun = throttle, Convergence(), None
        self._meter.add(now, sent)
        self._convergence.add(now, left)
        rate = self._meter.rate
        written = count(ram, "dirty-pages-rate") * (count(ram, "page-size") or _PAGE)
        written = written if number >= _TELLING else 0
        outrun = written >= rate > 0 and left > rate * self._limit
        self._outrun = (now if self._outrun is None else self._outrun) if outrun else None
        self._seen = Progress(
            status="running",
            phase="moving the memory",
            done=max(0, total - left),
            total=total,
            rate=rate,
            eta=until_fits(left, rate, written, self._limit) if rate and left else None,
            idle=now - self._moved[1],
            lagging=self._convergence.passes,
            downtime=self._expected(migration.get("expected-downtime"), number),
            written=written,
            throttle=throttle,
        )
        return self._seen

    def _expected(self, said: object, number: int) -> float | None:
        """Return how long QEMU expects it to stand; what it says at first is but the limit set."""
        if not isinstance(said, int):
            return None
        self._first = said if self._first is None else self._first
        self._measured = self._measured or (number >= _TELLING and said != self._first)
        return said / 1e3 if self._measured else None

    def hopeless(self, patience: float) -> bool:
        """Whether for so many seconds no pass was smaller, or more was written than sent."""
        outrun = self._outrun is not None and self._now - self._outrun > patience
        return outrun or self._convergence.hopeless(self._now, patience)

    def diverging(self, patience: float) -> StalledError:
        """Say that it does not converge, with the figures, and what would help."""
        seen = self._seen
        left = max(seen.remaining, self._convergence.distance)
        written = f"{human_size(int(seen.written))}/s" if seen.written else "not measured"
        slowed = f", slowed down by {seen.throttle}% as it is" if seen.throttle else ""
        return StalledError(
            "the migration does not converge: the guest writes to its memory faster than it is "
            f"sent (written: {written}{slowed}; sent: {human_size(int(seen.rate))}/s); {left} "
            f"bytes are left, and have not become less for {patience:g} s",
            remedy=self._remedy(replace(seen, total=left, done=0)),
        )

    def _remedy(self, seen: Progress) -> str:
        needed = _ROOM * seen.remaining / seen.rate if seen.rate else LONGEST_LIMIT + 1
        helps = []
        if needed <= LONGEST_LIMIT:
            helps.append(f"let it stand for longer (--downtime-limit {needed * 1e3:.0f})")
        if not seen.throttle:
            helps.append("have its CPUs slowed down (--auto-converge)")
        helps.append("raise --speed, where that is what limits the wire")
        helps.append("have it paused until it has gone over (--pause-after)")
        return f"let the guest do less, {', or '.join(helps)}"


def count(said: Mapping[str, Any], name: str) -> int:
    """Return a number that QEMU says; 0 where it says none."""
    value = said.get(name)
    return value if isinstance(value, int) else 0
