"""What the events of a migration say of the guest."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

from drawing import RUN

from qmpblock.migration.course import Course
from qmpblock.migration.stream import Stream


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
