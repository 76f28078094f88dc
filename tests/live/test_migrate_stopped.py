"""A guest that somebody stops on the way stays stopped, wherever it ends; whoever dies."""

import asyncio
import json
from pathlib import Path

import pytest
from chains import cli
from disturbed import nothing_of_ours, until, writes_on
from jsonschema import Draft202012Validator
from migrating import ROOM, SPEED, arrived, at, busy, dies_in, migrated, stays

import qmpblock
from qmpblock import MigrationMeans
from qmpblock.migration.journal import journals

pytestmark = pytest.mark.live

SCHEMA = json.loads((Path(__file__).parents[2] / "docs/schema/migrate.schema.json").read_text())


def stopping(source):
    async def stop():
        await source.execute("stop")

    return stop


async def stands(vm, *states):
    """See that the guest stands there, with nothing of ours."""
    assert (await vm.execute("query-status"))["status"] in states
    await nothing_of_ours(vm)
    assert list(journals()) == []


async def test_it_stays_so_that_was_stopped_while_its_memory_is_sent(
    begin, start_destination, monkeypatch
):
    source = await begin(extra=ROOM)
    destination = await start_destination(source, extra=ROOM)
    async with busy(source):  # else it might be held before
        with at(monkeypatch, "active", stopping(source)):
            result = await migrated(source, destination, speed=SPEED)
    assert result.destination == "paused"
    await stands(destination, "paused")


@pytest.mark.parametrize("phase", ["copying", "ready", "memory"])
async def test_it_stays_stopped_at_the_destination(phase, begin, start_destination, monkeypatch):
    source = await begin()
    destination = await start_destination(source)
    with at(monkeypatch, phase, stopping(source)):
        # It would be paused, if it were not.
        result = await migrated(source, destination, means=MigrationMeans(pause_after=30.0))
    assert (result.destination, result.resumed, result.paused) == ("paused", None, 0.0)
    assert result.notices[-1].text.startswith("the guest stays paused")
    await stands(destination, "paused")
    await destination.execute("cont")
    await arrived(source, destination, result)


async def test_what_is_said_of_it(begin, start_destination):
    source = await begin()
    destination = await start_destination(source)
    addresses = source.monitor_path, destination.monitor_path
    running = asyncio.create_task(cli("migrate", *addresses, "--speed", "4M", "--json"))
    await until(lambda: source.execute("query-jobs"), "a mirror")
    await source.execute("stop")
    code, out, err = await running
    assert code == 0, err
    told = json.loads(out)
    Draft202012Validator(SCHEMA).validate(told)
    assert told["destination"] == "paused"
    assert "somebody else had stopped it" in err
    assert (await destination.execute("query-status"))["status"] == "paused"


async def test_who_was_continued_again_runs(begin, start_destination, monkeypatch):
    source = await begin()
    destination = await start_destination(source)

    async def stop_and_go():
        await source.execute("stop")
        await source.execute("cont")

    with at(monkeypatch, "copying", stop_and_go):
        result = await migrated(source, destination)
    assert result.destination == "running"
    await arrived(source, destination, result)


@pytest.mark.parametrize("phase", ["held", "landed"])
async def test_it_stays_stopped_at_the_source(
    phase, begin, start_destination, invariant, monkeypatch
):
    source = await begin()
    await invariant.begin(source)
    destination = await start_destination(source)
    destination.expect_exit()

    async def fail():
        raise qmpblock.Error("broken off")

    with (
        at(monkeypatch, "memory", stopping(source)),
        at(monkeypatch, phase, fail),
        pytest.raises(qmpblock.Error, match="broken off") as failed,
    ):
        await migrated(source, destination)
    assert "stopped as somebody had it" in failed.value.standing
    await stands(source, "paused", "postmigrate")
    await source.execute("cont")
    await stays(source, invariant)


@pytest.mark.parametrize("carry_on", [False, True], ids=["undo", "continue"])
@pytest.mark.parametrize("phase", ["memory", "held", "ended", "sent", "landed", "handed"])
async def test_after_kill_9(phase, carry_on, begin, start_destination, invariant):
    """The source says it, the journal, and the mark: whoever recovers it leaves it so."""
    source = await begin()
    destination = await start_destination(source)
    for vm in (source, destination):
        vm.expect_exit()
        invariant.forget(vm)
    await dies_in(phase, source, destination, stop="memory")
    recovered = await qmpblock.recover_migration(source.monitor_path, carry_on=carry_on)
    assert recovered.done is (phase == "handed" or (phase == "landed" and carry_on))
    left, other = (destination, source) if recovered.done else (source, destination)
    await asyncio.wait_for(other.wait(), 20)
    await stands(left, "paused", "postmigrate")
    assert await qmpblock.recover_migration(left.monitor_path) is None
    await left.execute("cont")
    await writes_on(left.guest or await left.attach_guest())


@pytest.mark.parametrize("written", [True, False], ids=["journal", "no-journal"])
async def test_a_controller_is_killed_as_it_finishes(written, begin, start_destination, invariant):
    """The arbiter says it then, which stays at the source: the rest has been taken away."""
    source = await begin()
    destination = await start_destination(source)
    invariant.forget(source)
    source.expect_exit()
    await dies_in("finishing", source, destination, stop="memory", quit_source=True)
    for journal in journals():
        if not written:  # as on another host
            journal.remove()
    recovered = await qmpblock.recover_migration(source.monitor_path, destination.monitor_path)
    assert recovered.done
    await asyncio.wait_for(source.wait(), 20)
    await stands(destination, "paused")
    await destination.execute("cont")
    await writes_on(destination.guest or await destination.attach_guest())
