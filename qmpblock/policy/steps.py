"""What a policy means for one disk: from its layers' maps to what is to be done. Pure.

::

    today                          wanted: backing independent, allocation full
    @1 base      XX..XX....        @0 active    XYXXXX0000
    @0 active    .Y.X......                     ^ ^ ^^        brought up from below
                                                      ^^^^    reserved: host space for zeros

A plan is computed from the disk as it is, never from what was done before; so the plan of a
disk that is as it should be has no steps, and one that was done by half has the other half.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import Literal

import numpy as np

from qmpblock.allocation.plan import below, rounded
from qmpblock.extents.allocationmap import DATA, PRESENT, RESERVED, ZERO, AllocationMap
from qmpblock.policy.file import DiskPolicy
from qmpblock.ranges import Ranges
from qmpblock.sizes import check_range

__all__ = ["Changes", "Facts", "Picture", "PlannedStep", "plan_changes", "spans", "wanted_ranges"]


@dataclass(frozen=True)
class Picture:
    """The layers of a disk: file names and what each itself holds, the active one first."""

    files: tuple[str, ...]
    layers: tuple[AllocationMap, ...]

    @property
    def guest(self) -> AllocationMap:
        """What the guest sees, and which layer supplies it."""
        return AllocationMap.stack(self.layers)


@dataclass(frozen=True)
class Facts:
    """What has been found out about a disk.

    :ivar cluster: of the active layer, in bytes.
    :ivar base: the depth of the uppermost layer below the active one that is to stay; as many
        as there are layers where none is.
    :ivar like: where the pattern to be followed has host space.
    :ivar blank: of a disk whose data lies in its file as it is (raw, luks): what has no host
        space. None for other formats, whose map tells.
    """

    today: Picture
    cluster: int
    base: int = 1
    like: Ranges | None = None
    blank: Ranges | None = None


@dataclass(frozen=True)
class PlannedStep:
    """One thing to do.

    :ivar verb: `allocate` (thin), `reserve` (in full), or `drop` (what lies between the
        active layer and the base).
    :ivar bytes: that it brings up, and reserves, by today's maps.
    """

    verb: Literal["allocate", "reserve", "drop"]
    offset: int
    length: int
    bytes: int


@dataclass(frozen=True)
class Changes:
    """What is to be done to a disk.

    :ivar move: bytes of data to be copied from layers below into the active one. Those of it
        that are all zeros will be zeros there, which no map foretells.
    :ivar zeros: bytes to become explicit zeros there, which are not stored.
    :ivar reserve: bytes to get host space that no layer has, or only as zeros.
    :ivar leaving: files that leave the chain.
    """

    steps: tuple[PlannedStep, ...]
    wanted: Picture
    move: int = 0
    zeros: int = 0
    reserve: int = 0
    leaving: tuple[str, ...] = ()

    @property
    def work(self) -> int:
        """Bytes that count for the rate."""
        return self.move + self.zeros + self.reserve

    @property
    def reserves(self) -> bool:
        """Whether any step reserves host space."""
        return any(step.verb == "reserve" for step in self.steps)

    def seconds(self, speed: int) -> float | None:
        """Return how long that takes at a rate; None at no limit."""
        return self.work / speed if speed else None


def plan_changes(policy: DiskPolicy, facts: Facts) -> Changes:
    """Say what is to be done to a disk.

    :raise RangeError: the policy names a range outside it.
    """
    own = facts.today.layers
    guest = facts.today.guest
    size, cluster = guest.stop, facts.cluster
    chosen, full = wanted_ranges(policy, size, cluster, facts.like)
    under = below(guest).align_out(cluster, size)
    leaving = _supplied_above(guest, facts.base).align_out(cluster, size)

    # A cluster that holds data and zeros comes up as data (F9).
    held = own[0].where(present=True)
    up = (under & chosen) | leaving
    data = (up & guest.data()).align_out(cluster, size) - held
    zeros = up - data - held

    if facts.blank is not None:
        blank = facts.blank
    else:  # what comes up as zeros has no host space then, whatever it has below
        zero = guest.where(present=True, zero=True)
        nothing = guest.holes() | (zero - held) | own[0].where(present=True, zero=True, data=False)
        nothing = nothing - own[0].where(reserved=True)
        blank = (nothing - data).align_in(cluster, size)
    reserve = blank & chosen if full else Ranges()

    # What leaving layers supply comes up in any case, with which step does not matter. Data that
    # comes up may turn out to be zeros, which QEMU does not store: so all of it is looked at
    # again where host space is wanted.
    kept = under - leaving
    if full:
        thin = []
        reserved = spans(reserve | (under & chosen), (kept | blank) - chosen)
    else:
        thin = spans(kept & chosen, kept - chosen)
        reserved = []
    work = data | zeros | reserve
    steps = [_step("allocate", span, work) for span in thin]
    steps += [_step("reserve", span, work) for span in reserved]
    if facts.base > 1:
        left = work - Ranges([*thin, *reserved])
        steps.append(PlannedStep("drop", 0, size, left.total))

    painted = _painted(own[0], data, PRESENT | DATA)
    painted = _painted(painted, zeros, PRESENT | ZERO)
    if facts.blank is None:
        painted = _painted(painted, reserve, PRESENT | DATA)
    else:  # in a raw layer data may lie beside a blank, finer than the map tells
        zeros_there = reserve - own[0].where(data=True)
        painted = _painted(painted, zeros_there, PRESENT | ZERO | RESERVED)
    return Changes(
        steps=tuple(steps),
        wanted=Picture(
            (facts.today.files[0], *facts.today.files[facts.base :]), (painted, *own[facts.base :])
        ),
        move=data.total,
        zeros=(zeros - reserve).total,
        reserve=reserve.total,
        leaving=facts.today.files[1 : facts.base],
    )


def wanted_ranges(
    policy: DiskPolicy, size: int, cluster: int, like: Ranges | None = None
) -> tuple[Ranges, bool]:
    """Return where the policy wants the disk to be allocated, in whole clusters, and if in full.

    :raise RangeError: it names a range outside the disk.
    """
    if policy.allocation == "as-is":
        return Ranges(), False
    parts = []
    for part in policy.parts:
        length = None if part.length is None else part.length.of(size)
        start, count = check_range(size, part.offset.of(size), length)
        first, whole = rounded(start, count, cluster, size)
        parts.append((first, first + whole))
    chosen = Ranges(parts) if policy.parts else Ranges([(0, size)])
    if policy.allocation == "like":
        pattern = like if like is not None else Ranges()
        chosen = (chosen & pattern.clip(0, size)).align_out(cluster, size)
    return chosen, policy.allocation != "thin"


def spans(wanted: Ranges, avoid: Ranges) -> list[tuple[int, int]]:
    """Return the fewest (start, stop) that cover `wanted` and nothing of `avoid`.

    Where nothing of `avoid` lies between two ranges, one span covers both: allocating what
    needs it not is nothing.
    """
    merged: list[tuple[int, int]] = []
    edges = avoid.edges.tolist()
    for start, stop in wanted:
        if merged:
            last = merged[-1][1]
            # Neither inside `avoid` at `last`, nor does an edge of it lie before `start`.
            at = bisect_right(edges, last)
            if at % 2 == 0 and (at == len(edges) or edges[at] >= start):
                merged[-1] = (merged[-1][0], stop)
                continue
        merged.append((start, stop))
    return merged


def _supplied_above(guest: AllocationMap, base: int) -> Ranges:
    """Return what the layers between the active one and `base` supply, or hide by being short."""
    supplied = guest.where((guest.depth > 0) & (guest.depth < base), present=True)
    hides = (guest.depth < base - 1) & (guest.depth < guest.layers - 1)
    return supplied | guest.where(hides, present=False)


def _step(verb: Literal["allocate", "reserve"], span: tuple[int, int], work: Ranges) -> PlannedStep:
    start, stop = span
    return PlannedStep(verb, start, stop - start, (work & Ranges([span])).total)


def _painted(own: AllocationMap, where: Ranges, flags: int) -> AllocationMap:
    """Return a layer's own map with the flags of `where` replaced."""
    cut = own.cut(where.edges)
    inside = np.searchsorted(where.edges, cut.offsets, side="right") & 1
    changed = np.where(inside.astype(np.bool_), np.uint8(flags), cut.flags)
    return AllocationMap(
        cut.start, cut.stop, cut.offsets, cut.depth, changed, cut.layers
    ).coalesce()
