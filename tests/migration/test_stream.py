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


def test_whether_it_stood_before_qemu_held_it_is_heard() -> None:
    """Between stopping a guest and holding it QEMU does not look at its memory again (F40)."""
    heard: list[Any] = []
    vm = cast(
        "Any",
        SimpleNamespace(monitor=SimpleNamespace(subscribe=lambda *_, match: heard.append(match))),
    )

    def stood(*names: str) -> bool:
        stream = Stream(vm, RUN, cast("Any", None), lambda _: None, Course(0.0))
        for name in names:
            heard[-1]({"event": name, "data": {"pass": 1}})
        return stream.stood_before

    own = ("MIGRATION_PASS", "MIGRATION_PASS", "STOP")
    assert not stood(*own)
    assert stood("STOP", *own[:-1])
    assert stood("MIGRATION_PASS", "STOP", "MIGRATION_PASS")
    assert not stood("STOP", "MIGRATION_PASS", "RESUME", *own)


def test_that_it_is_about_to_stop_itself_is_heard() -> None:
    """Before its STOP: one that comes after it is of a guest that QEMU holds (F42)."""
    heard: list[Any] = []
    vm = cast(
        "Any",
        SimpleNamespace(monitor=SimpleNamespace(subscribe=lambda *_, match: heard.append(match))),
    )

    def stood(*events: tuple[str, str]) -> tuple[bool, str]:
        stream = Stream(vm, RUN, cast("Any", None), lambda _: None, Course(0.0))
        for name, action in events:
            heard[-1]({"event": name, "data": {"action": action}})
        return stream.stood_before, stream.shown

    failed, stop = ("BLOCK_IO_ERROR", "stop"), ("STOP", "")
    assert stood(failed, stop) == (True, "io-error")
    assert stood(failed, ("MIGRATION_PASS", ""), stop) == (True, "io-error")
    assert stood(("GUEST_PANICKED", "pause"), stop) == (True, "guest-panicked")
    assert stood(("WATCHDOG", "pause"), stop) == (True, "watchdog")
    assert stood(stop, failed) == (False, "")
    assert stood(failed, stop, ("RESUME", "")) == (False, "")
    for action in ("report", "ignore", "run", "poweroff"):
        assert stood(("BLOCK_IO_ERROR", action), stop) == (False, "")


async def test_what_is_counted_a_moment_after_the_end_is_asked_for_again() -> None:
    """As 7.2 counts its downtime: `completed` comes before."""
    told = [{"status": "completed", "downtime": one} for one in (0, 16, 99)]

    async def execute(command: str) -> Any:
        assert command == "query-migrate"
        return told.pop(0)

    monitor = SimpleNamespace(subscribe=lambda *_, match: None, execute=execute)
    vm = cast("Any", SimpleNamespace(monitor=monitor))
    stream = Stream(vm, RUN, cast("Any", None), lambda _: None, Course(0.0))
    for downtime in (0.0, 0.016, 0.016):
        await stream.look_back()
        assert stream.downtime == downtime
    assert len(told) == 1  # what is known is not asked for
