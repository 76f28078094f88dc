"""What a migration may do on request: what it says of that, what QEMU is told, what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import pytest

from qmpblock.errors import RequestError, UnsupportedError
from qmpblock.migration.means import MigrationMeans
from qmpblock.migration.record import MigrationRecord, Settings, read_record
from qmpblock.migration.settings import (
    THERE,
    Preset,
    check_channels,
    wanted_at_destination,
    wanted_at_source,
)
from qmpblock.qemu.capabilities import Capabilities

SAFE = dict.fromkeys(("dirty-bitmaps", "events", "pause-before-switchover", "return-path"), True)


@pytest.mark.parametrize("limit", [-1.0, 0.0001, 5.001, 3000.0])
def test_a_guest_that_would_stand_for_too_long_is_refused(limit: float) -> None:
    with pytest.raises(RequestError, match="nothing was touched"):
        MigrationMeans(limit).check()


def test_writes_cannot_wait_before_there_is_a_copy() -> None:
    with pytest.raises(RequestError, match="before there is a copy"):
        MigrationMeans(write_blocking_after=-1.0).check()


@pytest.mark.parametrize(
    ("after", "longest", "words"),
    [(-1.0, 60.0, "after some time"), (1.0, 0.0, "for some"), (0.0, 5.0, "not when it is")],
)
def test_a_pause_that_cannot_be_is_refused(after: float, longest: float, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        MigrationMeans(pause_after=after, longest_pause=longest).check()


def test_when_the_guest_is_paused_is_said() -> None:
    means = MigrationMeans(pause_after=30.0, longest_pause=5.0)
    means.check()
    assert means.any
    assert list(means.notices()) == []
    assert "in 30 s" in means.pause_notice()
    assert "longer than 5 s" in means.pause_notice()
    assert MigrationMeans().pause_notice() == ""
    assert wanted_at_source(means, 0) == wanted_at_source(MigrationMeans(), 0)


@pytest.mark.parametrize("number", [-1, 65, 256])
def test_so_many_channels_are_refused(number: int) -> None:
    with pytest.raises(RequestError, match=f"{number} channels"):
        MigrationMeans(multifd=number).check()


@pytest.mark.parametrize("number", [1, 64])
def test_channels_are_the_same_at_both_sides(number: int) -> None:
    means = MigrationMeans(multifd=number)
    means.check()
    [notice] = means.notices()
    assert f" {number} channel" in notice
    here, there = wanted_at_source(means, 0), wanted_at_destination(means)
    same = {"multifd-channels": number, "multifd-compression": "none"}
    assert dict(here.parameters) == dict(there.parameters) == same
    for one in (here, there):
        states = dict(one.capabilities)
        assert states["multifd"] is True
        assert not any(states[name] for name in ("compress", "xbzrle", "background-snapshot"))


def test_a_destination_is_told_nothing_unasked() -> None:
    assert wanted_at_destination(MigrationMeans(1.0, auto_converge=True)) == Settings()


@pytest.mark.parametrize("version", [(7, 2, 22), (9, 2, 4)])
def test_channels_with_which_a_source_could_hang_are_refused(version: tuple[int, int, int]) -> None:
    with pytest.raises(UnsupportedError, match="can hang for ever"):
        check_channels(MigrationMeans(multifd=1), Capabilities(version))
    check_channels(MigrationMeans(auto_converge=True), Capabilities(version))
    check_channels(MigrationMeans(multifd=1), Capabilities((10, 0, 0)))


async def test_a_destination_without_channels_is_refused() -> None:
    vm = Recorder({"xbzrle": False}, {"multifd-channels": 2})
    wanted = wanted_at_destination(MigrationMeans(multifd=2))
    with pytest.raises(UnsupportedError, match="the destination's QEMU cannot migrate with multi"):
        await Preset.of(cast("Any", vm), wanted, THERE)
    assert vm.told == []


@pytest.mark.parametrize("limit", [0.0, 0.001, 0.3, 5.0])
def test_what_can_be_is_not_refused(limit: float) -> None:
    MigrationMeans(limit).check()


def test_nothing_is_done_or_said_unasked() -> None:
    means = MigrationMeans()
    assert not means.any
    assert list(means.notices()) == []
    wanted = wanted_at_source(means, 0)
    assert wanted.parameters == ()
    assert {name for name, state in wanted.capabilities if state} == set(SAFE)
    assert ("auto-converge", False) in wanted.capabilities


def test_what_is_done_is_said() -> None:
    means = MigrationMeans(0.25, auto_converge=True)
    assert means.any
    limit, slower = means.notices()
    assert "stand for 250 ms" in limit
    assert "CPUs are slowed down" in slower
    wanted = wanted_at_source(means, 7)
    assert dict(wanted.parameters) == {"max-bandwidth": 7, "downtime-limit": 250}
    assert ("auto-converge", True) in wanted.capabilities
    assert ("auto-converge", False) not in wanted.capabilities


class Recorder:
    """Says what a QEMU's settings are, and takes down what it is told."""

    def __init__(self, capabilities: Mapping[str, bool], parameters: Mapping[str, int]) -> None:
        self.capabilities = dict(capabilities)
        self.parameters = dict(parameters)
        self.told: list[str] = []

    async def execute(self, command: str, arguments: dict[str, Any] | None = None) -> Any:
        if command == "query-migrate-parameters":
            return dict(self.parameters)
        if command == "query-migrate-capabilities":
            return [{"capability": k, "state": v} for k, v in self.capabilities.items()]
        self.told.append(command)
        assert arguments is not None
        if command == "migrate-set-parameters":
            self.parameters |= arguments
        else:
            assert command == "migrate-set-capabilities"
            listed = arguments["capabilities"]
            self.capabilities |= {one["capability"]: one["state"] for one in listed}
        return {}

    async def read(self, *commands: str) -> list[Any]:
        return [await self.execute(command) for command in commands]


async def test_what_was_set_is_put_back() -> None:
    states = {**dict.fromkeys(SAFE, False), "events": True, "auto-converge": False, "x-colo": True}
    vm = Recorder(states, {"downtime-limit": 300, "max-bandwidth": 5})
    wanted = wanted_at_source(MigrationMeans(1.0, auto_converge=True), 5)
    preset = await Preset.of(cast("Any", vm), wanted)
    assert vm.told == []
    assert preset.had == Settings(
        (
            ("dirty-bitmaps", False),
            ("pause-before-switchover", False),
            ("return-path", False),
            ("auto-converge", False),
            ("x-colo", True),
        ),
        (("downtime-limit", 300),),
    )
    await preset.restore()
    assert vm.told == []  # nothing was set
    await preset.apply()
    assert vm.capabilities == {**SAFE, "auto-converge": True, "x-colo": False}
    assert vm.parameters == {"downtime-limit": 1000, "max-bandwidth": 5}
    vm.parameters["max-bandwidth"] = 9  # by somebody else meanwhile: none of ours
    await preset.restore()
    await preset.restore()
    assert vm.capabilities == states
    assert vm.parameters == {"downtime-limit": 300, "max-bandwidth": 9}
    assert len(vm.told) == 4


async def test_a_qemu_that_has_it_not_is_refused() -> None:
    vm = Recorder(SAFE, {"downtime-limit": 300})
    with pytest.raises(UnsupportedError, match="cannot migrate with auto-converge"):
        await Preset.of(cast("Any", vm), wanted_at_source(MigrationMeans(0, auto_converge=True), 0))


def test_a_record_tells_what_it_was() -> None:
    who = {"pid": 1, "start": 2, "boot": "", "uuid": "", "monitor": "", "name": ""}
    old = {"run": "ab12cd34", "source": who, "destination": who, "pids": ""}
    read = read_record(old)
    assert read.source_had == Settings()
    had = Settings((("events", False),), (("downtime-limit", 300),))
    assert read.destination_had == Settings()
    there = Settings((("multifd", False),), (("multifd-compression", "zlib"),))
    record = MigrationRecord(read.run, read.source, read.destination, "", had, there)
    assert read_record(record.as_json()) == record
