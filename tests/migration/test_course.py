"""The course of a migration: what phases, mirrors and passes took, for how long it stood."""

from __future__ import annotations

from itertools import pairwise

import pytest

from qmpblock.migration.course import Course, MemoryPass, PhaseTime
from qmpblock.migration.states import Phase

MIB = 1 << 20


def test_a_phase_has_what_was_moved_while_it_lasted() -> None:
    course = Course(100.0)
    course.enter(101.0, Phase.MIRRORING)
    course.mirrored(101.0, "a", 0, ready=False)
    course.mirrored(104.0, "a", 6 * MIB, ready=False)
    course.mirrored(104.0, "b", 2 * MIB, ready=True)
    course.enter(105.0, Phase.MEMORY)
    course.sent(106.0, 5 * MIB, 0, 1)
    course.mirrored(106.0, "a", 7 * MIB, ready=True)
    course.enter(107.0, Phase.HELD)
    assert course.phases(107.5) == (
        PhaseTime("checked", 1.0, 0, 0.0),
        PhaseTime("mirroring", 4.0, 8 * MIB, 2.0 * MIB),
        PhaseTime("memory", 2.0, 6 * MIB, 3.0 * MIB),
        PhaseTime("held", 0.5, 0, 0.0),
    )


def test_a_mirror_has_a_rate_until_it_was_ready() -> None:
    course = Course(10.0)
    assert course.mirror("a").moments == ()
    course.mirrored(12.0, "a", 0, ready=False)
    course.mirrored(16.0, "a", 8 * MIB, ready=True)
    course.mirrored(30.0, "a", 9 * MIB, ready=True)
    one = course.mirror("a")
    assert (one.began, one.seconds, one.rate) == (2.0, 4.0, 2.0 * MIB)
    assert one.moments == ((2.0, 0), (6.0, 8 * MIB), (20.0, 9 * MIB))


@pytest.mark.parametrize("looks", [127, 128, 1000, 100_000])
def test_of_a_mirror_a_bounded_number_of_moments_is_kept(looks: int) -> None:
    course = Course(0.0)
    for look in range(looks):
        course.mirrored(look / 4, "a", look * MIB, ready=False)
    moments = course.mirror("a").moments
    assert min(looks, 64) <= len(moments) <= 128
    assert moments[0] == (0.0, 0)
    assert moments[-1] == ((looks - 1) / 4, (looks - 1) * MIB)
    assert list(moments) == sorted(moments)
    widest = max(later[0] - one[0] for one, later in pairwise(moments))
    assert widest <= max(0.5, looks / 4 / 20)


def test_passes_are_told_by_events_and_by_looks() -> None:
    course = Course(0.0)
    assert course.passes() == ()
    course.passes_on(1.0, 1)
    course.sent(1.1, 1 * MIB, 40 * MIB, 1)
    course.sent(2.0, 39 * MIB, 2 * MIB, 1)
    course.sent(3.0, 41 * MIB, 4 * MIB, 2)  # its event was lost
    course.passes_on(5.0, 3)
    course.sent(5.5, 46 * MIB, 0, 3)
    assert course.passes() == (
        MemoryPass(1, 1.0, 2.0, 40 * MIB, 41 * MIB, 20.5 * MIB),
        MemoryPass(2, 3.0, 2.0, 4 * MIB, 0, 0.0),
        MemoryPass(3, 5.0, 0.5, 0, 5 * MIB, 10.0 * MIB),
    )


def test_how_long_it_stood_is_told_where_both_words_were_heard() -> None:
    course = Course(5.0)
    course.stops(6.0)
    assert (course.stopped, course.resumed, course.longest_stall) == (1.0, None, 0.0)
    course.resumes(6.25)
    assert (course.resumed, course.longest_stall) == (1.25, 0.25)


def test_for_how_long_it_stood_before_the_source_held_it() -> None:
    course = Course(5.0)
    course.enter(7.0, Phase.MEMORY)
    course.stops(8.0)
    assert course.stood_before == 0.0
    course.enter(10.5, Phase.HELD)
    assert course.stood_before == 2.5
