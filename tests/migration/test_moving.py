"""What query-migrate says of the memory: how far it is, when it is there, and whether ever."""

from __future__ import annotations

from typing import Any

import pytest

from qmpblock.migration.moving import Moving

MIB = 1 << 20


def said(number: int, sent: int, left: int, expected: object = 300) -> dict[str, Any]:
    """Return what a QEMU says that is at a pass."""
    ram = {"transferred": sent, "remaining": left, "total": 1000, "dirty-sync-count": number}
    return {"status": "active", "expected-downtime": expected, "ram": ram}


def test_what_it_expects_counts_from_the_second_pass_on() -> None:
    moving = Moving()
    first = moving.add(0.0, said(1, 100, 900))
    assert (first.done, first.total, first.downtime) == (100, 1000, None)
    second = moving.add(2.0, said(2, 500, 400, 5000))
    assert second.downtime == 5.0
    assert second.rate == pytest.approx(200.0)
    assert second.eta == pytest.approx(2.0)
    assert moving.add(3.0, said(3, 600, 300, 300)).downtime == 0.3  # it is measured by now
    assert moving.add(3.0, said(1, 700, 200, 200)).downtime == 0.2


def test_the_limit_that_was_set_is_no_prediction() -> None:
    moving = Moving()
    told = [moving.add(float(n), said(n, n, 9 - n, 1)).downtime for n in range(1, 5)]
    assert told == [None] * 4
    assert moving.add(5.0, said(5, 5, 4, 7)).downtime == 0.007


def test_in_the_first_pass_nothing_is_measured() -> None:
    moving = Moving()
    moving.add(0.0, said(1, 1, 9, 1))
    assert moving.add(1.0, said(1, 2, 8, 70)).downtime is None


@pytest.mark.parametrize("expected", [None, "soon", [], {}])
def test_what_is_no_number_is_no_prediction(expected: object) -> None:
    moving = Moving()
    moving.add(0.0, said(1, 1, 2))
    assert moving.add(1.0, said(3, 1, 2, expected)).downtime is None


def test_nothing_is_known_before_it_has_begun() -> None:
    seen = Moving().add(0.0, {"status": "setup"})
    assert (seen.done, seen.total, seen.eta, seen.downtime) == (0, 0, None, None)


def busy(
    moving: Moving,
    seconds: int,
    *,
    written: int = 12,
    sent: int = 8,
    left: int = 40,
    throttle: int = 0,
) -> None:
    """Have a guest write so many MiB a second, as many sent; each second a pass begins."""
    begin = int(moving._now) + 1
    for now in range(begin, begin + seconds):
        ram = {
            "transferred": now * sent * MIB,
            "remaining": left * MIB,
            "total": 64 * MIB,
            "dirty-sync-count": now + 1,
            "dirty-pages-rate": written * 256,
            "page-size": 4096,
        }
        said = {"status": "active", "ram": ram}
        if throttle:
            said["cpu-throttle-percentage"] = throttle
        moving.add(float(now), said)


def test_a_guest_that_outruns_the_wire_is_hopeless_after_a_while() -> None:
    moving = Moving(0.3)
    busy(moving, 10)
    assert not moving.hopeless(10)
    busy(moving, 3)
    assert moving.hopeless(10)
    error = moving.diverging(10)
    assert "written: 12M/s; sent: 8M/s" in error.message
    assert f"{40 * MIB} bytes are left" in error.message
    assert "--downtime-limit" not in (error.remedy or "")  # seven seconds are too long
    assert "--auto-converge" in (error.remedy or "")


def test_what_would_help_is_said() -> None:
    moving = Moving(0.3)
    busy(moving, 12, left=16, throttle=40)
    error = moving.diverging(10)
    assert "--downtime-limit 3000" in (error.remedy or "")
    assert "--auto-converge" not in (error.remedy or "")
    assert "slowed down by 40% as it is" in error.message


def test_what_fits_into_the_standstill_is_not_hopeless() -> None:
    moving = Moving(5.5)
    busy(moving, 30)
    assert not moving.hopeless(10)


def test_a_guest_that_is_slowed_down_further_is_given_time() -> None:
    moving = Moving(0.3)
    for throttle in (20, 30, 40):
        busy(moving, 9, throttle=throttle)
        assert not moving.hopeless(9)
    busy(moving, 3, throttle=40)
    assert moving.hopeless(9)
    assert moving._seen.throttle == 40


def test_when_it_is_there_is_predicted_with_what_is_written_meanwhile() -> None:
    moving = Moving(0.5)
    busy(moving, 8, written=4, left=16)
    # 16 MiB take 2 s, in which 8 are written; those take 1 s; the next 4 fit into the standstill.
    assert moving._seen.written == 4 * MIB
    assert moving._seen.eta == pytest.approx(3.0)
    busy(moving, 1, written=40, left=16)
    assert moving._seen.eta is None
