"""Rates, convergence and speed limits, by a clock of numbers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpblock.speed import WINDOW, Convergence, RateMeter, Speed

MB = 1000 * 1000


def watched(looks, every=1.0):
    """Return a Convergence that saw these megabytes, one look a second, and the time then."""
    pace, time = Convergence(), 0.0
    for time, remaining in enumerate(looks):
        pace.add(time * every, int(remaining * MB))
    return pace, time * every


def saw(peaks, valley=2.5, times=1):
    """Each pass: down from its peak to the valley."""
    return [look for _ in range(times) for peak in peaks for look in (peak, peak / 2, valley)]


def test_the_measured_saw_tooth_is_hopeless():
    """Facts: 17.1, 3.7, 15.9, 2.5, 15.9 MB ... the guest writes as fast as the job copies."""
    pace, now = watched([17.1, 3.7, 15.9, 2.5, 15.9, 2.5, 15.9, 2.5, 15.9, 2.5, 15.8])
    assert pace.passes >= 3
    assert pace.hopeless(now, 5)
    assert not pace.hopeless(now, 1000)  # not for so long yet


def test_becoming_smaller_is_not_hopeless():
    pace, now = watched(saw([64, 32, 16, 8, 4, 2, 1], valley=0.1))
    assert pace.passes == 0
    assert not pace.hopeless(now + 10**6, 1)


def test_one_long_pass_says_nothing():
    """It only falls: a disk of many terabytes, no pass has ended yet."""
    pace, now = watched(range(5000, 0, -1))
    assert pace.passes == 0
    assert not pace.hopeless(now, 1)


def test_standing_still_is_no_pass():
    """That is the stall limit's business."""
    pace, now = watched([16] * 1000)
    assert pace.passes == 0
    assert not pace.hopeless(now, 1)


def test_hardly_smaller_counts_as_no_smaller():
    """A hundredth less a pass would take for ever; a tenth does not."""
    creeping = [16 * 0.99**n for n in range(5)]
    falling = [16 * 0.9**n for n in range(30)]
    assert watched(saw(creeping))[0].passes == 3
    assert watched(saw(falling, valley=0.1))[0].passes == 0


def test_creeping_counts_again_once_it_has_come_far_enough():
    """Compared with the smallest pass since the count began, not with the one before."""
    assert watched(saw([16 * 0.97**n for n in range(3)]))[0].passes == 1
    assert watched(saw([16 * 0.97**n for n in range(4)]))[0].passes == 0


def test_a_burst_of_the_guest_does_not_doom_what_then_converges():
    pace, now = watched(saw([16, 16, 16, 16, 16]) + saw([8, 4, 2], valley=0.5))
    assert pace.passes == 0
    assert not pace.hopeless(now, 1)


def test_time_counts_from_the_last_pass_that_was_smaller():
    pace, now = watched(saw([16, 8]) + saw([8] * 10))
    began = 3.0  # when the pass of 8 was first seen
    assert pace.hopeless(now, now - began - 1)
    assert not pace.hopeless(now, now - began + 1)


def test_the_last_cluster_is_given_longer():
    """It cannot become smaller, only none: one at each look for 20 s was seen, and then none."""
    clusters = [0.065536, 0, 0.065536, 0, 0.065536, 0, 0.065536, 0, 0.065536]
    pace, now = watched(clusters, every=3)
    assert pace.passes == 3
    assert not pace.hopeless(now, now / 2)
    assert pace.hopeless(now * 4, now / 2)  # a guest that writes there for ever is told of
    more, _ = watched([100 * one for one in clusters], every=3)
    assert more.hopeless(now, now / 2)


@given(st.lists(st.integers(0, 1 << 50), max_size=40), st.floats(0.01, 100))
def test_what_only_falls_is_never_hopeless(looks, every):
    pace = Convergence()
    for number, remaining in enumerate(sorted(looks, reverse=True)):
        pace.add(number * every, remaining)
    assert not pace.hopeless(len(looks) * every + 10**9, 0.001)


@given(st.integers(1 << 10, 1 << 40), st.integers(6, 50), st.floats(0.1, 0.9))
def test_equal_teeth_are_hopeless_however_high(peak, count, valley):
    pace = Convergence()
    for number in range(count):
        pace.add(2.0 * number, peak)
        pace.add(2.0 * number + 1, int(peak * valley))
    assert pace.hopeless(2.0 * count, 1)


def test_a_job_with_a_speed_rests_with_nothing_left_and_is_hopeless_all_the_same():
    """Measured: 2 MiB copied in a moment, two seconds of rest, and all of it is dirty again."""
    pace, whole = Convergence(), 8 << 20
    for second in range(0, 60, 2):
        for look in range(8):
            pace.add(second + look / 4, 0, whole)
        whole += 2 << 20
    assert pace.hopeless(60, 30)
    assert pace.distance == 2 << 20


def test_a_job_with_a_speed_whose_passes_become_smaller_is_not_hopeless():
    pace, whole = Convergence(), 8 << 20
    for number in range(12):
        pace.add(2.0 * number, 0, whole)
        whole += (4 << 20) >> number
    assert pace.passes == 0
    assert not pace.hopeless(10**6, 1)


def test_rate_over_the_window():
    meter = RateMeter(window=5)
    assert meter.rate == 0
    meter.add(0.0, 0)
    assert meter.rate == 0  # one look tells nothing
    for second in range(1, 21):
        meter.add(float(second), second * 10)
    assert meter.rate == 10
    for second in range(21, 31):
        meter.add(float(second), 200)
    assert meter.rate == 0  # what was before the window is forgotten


def test_rate_of_a_job_that_began_anew():
    """It went back: a rate below zero would be nonsense."""
    meter = RateMeter()
    meter.add(0.0, 100)
    meter.add(1.0, 200)
    meter.add(2.0, 0)
    assert meter.rate == 0
    meter.add(3.0, 50)
    assert meter.rate == 50


def test_two_looks_at_one_moment_divide_by_nothing():
    meter = RateMeter()
    meter.add(1.0, 0)
    meter.add(1.0, 100)
    assert meter.rate == 0


def test_looks_far_apart_still_give_a_rate():
    meter = RateMeter()
    meter.add(0.0, 0)
    meter.add(WINDOW * 100, 1000)
    assert meter.rate == pytest.approx(1000 / (WINDOW * 100))


@given(st.lists(st.tuples(st.floats(0, 1e6), st.integers(0, 1 << 60)), max_size=50))
def test_a_rate_is_never_negative(samples):
    meter = RateMeter()
    for time, done in sorted(samples, key=lambda one: one[0]):
        meter.add(time, done)
        assert meter.rate >= 0


def test_no_limit_never_waits():
    speed = Speed()
    assert [speed.take(0.0, 1 << 40) for _ in range(3)] == [0, 0, 0]


def test_a_limit_holds():
    speed = Speed(1000)
    now = 1000.0
    for _ in range(100):
        now += speed.take(now, 100)
    # The last one begins when the 99 before are paid for; a fifth of a second was saved up.
    assert now - 1000 == pytest.approx(99 * 0.1 - 0.2)


def test_what_is_not_used_is_not_saved_up():
    """After an hour of rest not an hour's worth may go at once."""
    speed = Speed(1000)
    speed.take(0.0, 100)
    waits = [speed.take(3600.0, 100) for _ in range(4)]
    assert waits[:2] == [0, 0]
    assert waits[3] > 0


def test_a_limit_can_change_while_it_is_used():
    speed = Speed(1000)
    speed.take(10.0, 10_000)  # ten seconds' worth
    assert speed.take(10.0, 1) > 9
    speed.rate = 0
    assert speed.take(10.0, 1 << 40) == 0
    speed.rate = 1000
    assert speed.take(10.0, 100) == 0  # what was owed under the old limit is forgotten
