"""What is to be expected of a migration, by figures."""

from __future__ import annotations

import pytest

from qmpblock.migration.predict import HAND_OVER, Load, Room, lacking, predict

MIB, GIB = 1 << 20, 1 << 30


def test_a_guest_that_writes_nothing_takes_what_the_wire_takes():
    seen = predict(Load({}, 0.0), data=10 * GIB, memory=2 * GIB, speed=100 * MIB, limit=0.3)
    assert seen.converges is True
    assert (seen.disks, seen.memory) == (102.4, 20.48)
    assert seen.downtime == pytest.approx(HAND_OVER)
    assert seen.seconds == pytest.approx(122.88 + HAND_OVER)


def test_what_the_guest_writes_is_taken_from_the_wire():
    load = Load({"vd0": 30 * MIB, "vd1": 20 * MIB}, 25 * MIB)
    seen = predict(load, data=GIB, memory=GIB, speed=100 * MIB, limit=0.3)
    assert seen.disks == pytest.approx(1024 / 50)
    # Passes of 1024, 512, 256, 128, 64 and 32 MiB at 50 a second, until 15 are left.
    assert seen.memory == pytest.approx(sum(1024 / 2**n for n in range(7)) / 50)
    assert seen.downtime == pytest.approx(8 / 50 + HAND_OVER)
    assert seen.needed == 75 * MIB


@pytest.mark.parametrize(("disks", "memory"), [(120, 0), (60, 60), (0, 100)])
def test_a_guest_that_outruns_the_wire_never_ends(disks, memory):
    load = Load({"vd0": disks * MIB}, memory * MIB)
    seen = predict(load, data=GIB, memory=GIB, speed=100 * MIB, limit=0.3)
    assert seen.converges is False
    assert (seen.disks, seen.memory, seen.downtime, seen.seconds) == (None,) * 4
    assert "does not end" in seen.why
    assert "100M/s" in seen.why


def test_memory_that_fits_into_the_downtime_always_ends():
    seen = predict(Load({}, GIB), data=0, memory=16 * MIB, speed=100 * MIB, limit=0.3)
    assert (seen.converges, seen.memory) == (True, 0.0)
    assert seen.downtime == pytest.approx(0.16 + HAND_OVER)


def test_without_a_speed_only_what_is_needed_is_said():
    seen = predict(Load({"vd0": 3 * MIB}, 4 * MIB), data=GIB, memory=GIB, speed=0, limit=0.3)
    assert (seen.converges, seen.needed, seen.seconds) == (None, 7 * MIB, None)
    assert "more than that" in seen.why


def test_what_is_not_measured_is_said_to_be_so():
    seen = predict(Load({}, None), data=0, memory=MIB, speed=0, limit=0.3)
    assert "not measured" in seen.why


def test_the_guest_waits_for_each_message():
    near, far = (
        predict(Load({}, 0.0), data=0, memory=MIB, speed=GIB, limit=0.3, latency=seconds).downtime
        for seconds in (0.0, 0.1)
    )
    assert far - near == pytest.approx(0.6)


def test_room_is_counted_for_all_disks_of_a_file_system_together():
    one = Room("/a/x", 1, 600, 1000)
    assert list(lacking([one, Room("/b/y", 2, 600, 1000)])) == []
    [said] = lacking([one, Room("/a/y", 1, 401, 1000)])
    assert "/a/x has 1000 bytes free" in said
    assert "up to 1001" in said
