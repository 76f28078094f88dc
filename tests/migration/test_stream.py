"""What query-migrate says of the memory, as progress; what its events say of the guest."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
from drawing import RUN

from qmpblock.migration.course import Course
from qmpblock.migration.stream import Stream, _Moving


def said(number: int, sent: int, left: int, expected: object = 300) -> dict[str, Any]:
    """Return what a QEMU says that is at a pass."""
    ram = {"transferred": sent, "remaining": left, "total": 1000, "dirty-sync-count": number}
    return {"status": "active", "expected-downtime": expected, "ram": ram}


def test_what_it_expects_counts_from_the_second_pass_on() -> None:
    moving = _Moving()
    first = moving.add(0.0, said(1, 100, 900))
    assert (first.done, first.total, first.downtime) == (100, 1000, None)
    second = moving.add(2.0, said(2, 500, 400, 5000))
    assert second.downtime == 5.0
    assert second.rate == pytest.approx(200.0)
    assert second.eta == pytest.approx(2.0)
    assert moving.add(3.0, said(3, 600, 300, 300)).downtime == 0.3  # it is measured by now
    assert moving.add(3.0, said(1, 700, 200, 200)).downtime == 0.2


def test_the_limit_that_was_set_is_no_prediction() -> None:
    moving = _Moving()
    told = [moving.add(float(n), said(n, n, 9 - n, 1)).downtime for n in range(1, 5)]
    assert told == [None] * 4
    assert moving.add(5.0, said(5, 5, 4, 7)).downtime == 0.007


def test_in_the_first_pass_nothing_is_measured() -> None:
    moving = _Moving()
    moving.add(0.0, said(1, 1, 9, 1))
    assert moving.add(1.0, said(1, 2, 8, 70)).downtime is None


@pytest.mark.parametrize("expected", [None, "soon", [], {}])
def test_what_is_no_number_is_no_prediction(expected: object) -> None:
    moving = _Moving()
    moving.add(0.0, said(1, 1, 2))
    assert moving.add(1.0, said(3, 1, 2, expected)).downtime is None


def test_nothing_is_known_before_it_has_begun() -> None:
    seen = _Moving().add(0.0, {"status": "setup"})
    assert (seen.done, seen.total, seen.eta, seen.downtime) == (0, 0, None, None)


def test_whether_the_guest_has_gone_on_at_the_source_is_heard() -> None:
    heard: list[Any] = []

    def subscribe(*names: str, match: Any) -> None:
        heard.extend([names, match])

    vm = cast("Any", SimpleNamespace(monitor=SimpleNamespace(subscribe=subscribe)))
    stream = Stream(vm, RUN, cast("Any", None), lambda _: None, Course(0.0))
    names, hears = heard
    assert {"STOP", "RESUME"} <= set(names)
    went_on = []
    for name in ("RESUME", "STOP", "MIGRATION", "RESUME", "STOP"):
        hears({"event": name, "data": {}})
        went_on.append(stream.went_on)
    assert went_on == [True, False, False, True, False]
