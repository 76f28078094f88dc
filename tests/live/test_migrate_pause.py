"""A guest that outruns its migration is paused until it has gone over, or goes on at the source."""

import asyncio
import contextlib
import json
from pathlib import Path

import pytest
from chains import cli
from disturbed import nothing_of_ours
from jsonschema import Draft202012Validator
from migrating import ROOM, SPEED, arrived, at, busy, dies_in, migrated, slow_wire, stays
from nbdservers import make_credentials_of

import qmpblock
from qmpblock import MigrationMeans
from qmpblock.errors import StalledError
from qmpblock.migration.pause import Pause

pytestmark = pytest.mark.live

MIB = 1 << 20
SCHEMA = json.loads((Path(__file__).parents[2] / "docs/schema/migrate.schema.json").read_text())


@contextlib.contextmanager
def as_it_pauses(monkeypatch, do):
    """Do something as soon as the guest is paused."""
    begin = Pause._begin

    async def begun(self):
        paused = await begin(self)
        await do()
        return paused

    with monkeypatch.context() as patch:
        patch.setattr(Pause, "_begin", begun)
        yield


async def writes_on(vm):
    """See that the guest goes on; its last word may have gone lost, it was so busy."""

    async def written():
        [disk] = await vm.execute("query-blockstats")
        return disk["stats"]["wr_operations"], disk["stats"]["failed_wr_operations"]

    before, failed = await written()
    async with asyncio.timeout(20):
        while (await written())[0] <= before:
            await asyncio.sleep(0.01)
    assert failed == 0


async def test_memory_that_is_written_faster_than_sent(begin, start_destination):
    source = await begin(extra=ROOM)
    destination = await start_destination(source, extra=ROOM)
    words = ("--pause-after", "1", "--speed", str(SPEED), "--json")
    async with busy(source):
        code, out, err = await cli("migrate", source.monitor_path, destination.monitor_path, *words)
    assert code == 0, err
    told = json.loads(out)
    Draft202012Validator(SCHEMA).validate(told)
    asked, *_, paused = told["notices"]
    assert "where it has not gone over in 1 s" in asked["text"]
    assert "the guest is paused until" in paused["text"]
    assert 1 < paused["at"] < told["stopped"]
    assert 0 < told["paused"] < told["longest_stall"]
    assert f"migration: {paused['text']}" in err
    assert (await destination.execute("query-status"))["status"] == "running"
    await nothing_of_ours(destination)
    await writes_on(destination)


async def test_disks_that_are_written_faster_than_copied(begin, start_destination, monkeypatch):
    source = await begin(rate=900)
    destination = await start_destination(source)
    async with slow_wire(monkeypatch, 2 * MIB):
        result = await migrated(source, destination, means=MigrationMeans(pause_after=2.0))
    *_, paused = result.notices
    assert "the guest is paused until" in paused.text
    assert paused.at < result.stopped
    assert 0 < result.paused < result.longest_stall
    await arrived(source, destination, result)


@pytest.mark.parametrize(
    ("what", "how"),
    [
        *(("disks", how) for how in ("cancelled", "killed")),
        *(("memory", how) for how in ("cancelled", "too long", "continued")),
    ],
)
async def test_it_goes_on_at_the_source(
    what, how, begin, start_destination, invariant, monkeypatch
):
    """Whatever ends the migration; also where somebody has it go on meanwhile."""
    source = await begin(extra=ROOM, rate=900 if what == "disks" else 300)
    await invariant.begin(source)
    destination = await start_destination(source, extra=ROOM)
    destination.expect_exit()

    async def do():
        assert (await source.execute("query-status"))["status"] == "paused"
        if how == "cancelled":
            running.cancel()
        elif how == "killed":
            await destination.kill()
        elif how == "continued":
            await source.execute("cont")

    async def soon(self):
        return 0.1

    longest = {"longest_pause": 0.2} if how == "too long" else {}
    means = MigrationMeans(pause_after=1.0, **longest)
    with monkeypatch.context() as patch:
        patch.setattr(Pause, "_takes", soon)
        options = {"means": means, "stall": 10}  # a slow wire's copies end before QEMU stops
        async with contextlib.AsyncExitStack() as stack:
            if what == "disks":
                await stack.enter_async_context(slow_wire(patch, 2 * MIB))
            else:
                await stack.enter_async_context(busy(source))
                options["speed"] = SPEED
            with as_it_pauses(monkeypatch, do):
                running = asyncio.create_task(migrated(source, destination, **options))
                with pytest.raises((qmpblock.Error, asyncio.CancelledError)) as failed:
                    await running
    if how != "cancelled":
        print(failed.value)
        assert "the guest runs at the source, where nothing of ours is left" in str(failed.value)
    if how == "too long":
        assert "paused for 0.2 s" in failed.value.message
    if how == "continued":
        assert "does not converge" in failed.value.message
    await stays(source, invariant)


async def test_it_is_not_paused_for_longer_than_it_may(begin, start_destination, invariant):
    source = await begin(extra=ROOM)
    await invariant.begin(source)
    destination = await start_destination(source, extra=ROOM)
    destination.expect_exit()
    means = MigrationMeans(pause_after=0.5, longest_pause=0.05)
    async with busy(source):
        with pytest.raises(StalledError, match="does not converge") as failed:
            await migrated(source, destination, stall=4, speed=SPEED, means=means)
    assert "(--longest-pause " in failed.value.remedy
    assert not any('"execute": "stop"' in line for line in source.qmp_log())
    await stays(source, invariant)


async def test_who_was_stopped_by_somebody_else_stays_so(
    begin, start_destination, invariant, monkeypatch
):
    source = await begin(extra=ROOM)
    await invariant.begin(source)
    destination = await start_destination(source, extra=ROOM)
    destination.expect_exit()

    async def do():
        await source.execute("stop")
        await destination.kill()

    async with busy(source):
        with at(monkeypatch, "active", do), pytest.raises(qmpblock.Error) as failed:
            await migrated(source, destination, speed=SPEED, means=MigrationMeans(pause_after=30.0))
    assert "the guest is at the source, stopped as somebody had it" in failed.value.standing
    assert (await source.execute("query-status"))["status"] == "paused"
    await source.execute("cont")
    await stays(source, invariant)


@pytest.mark.parametrize("phase", ["marked", "paused", "held", "landed", "handed"])
async def test_after_kill_9(phase, begin, start_destination, invariant):
    """Whoever recovers it has the guest go on: who paused it is told by the VM itself."""
    source = await begin(extra=ROOM)
    destination = await start_destination(source, extra=ROOM)
    for vm in (source, destination):
        vm.expect_exit()
        invariant.forget(vm)
    async with busy(source):
        means = {"pause_after": 1.0}
        await dies_in(phase, source, destination, speed=SPEED, means=means)
    if phase in ("marked", "paused"):
        expected = "running" if phase == "marked" else "paused"
        assert (await source.execute("query-status"))["status"] == expected
    recovered = await qmpblock.recover_migration(source.monitor_path)
    assert recovered.done is (phase == "handed")
    left, other = (destination, source) if recovered.done else (source, destination)
    await asyncio.wait_for(other.wait(), 20)
    assert (await left.execute("query-status"))["status"] == "running"
    await nothing_of_ours(left)
    await writes_on(left)


@pytest.mark.parametrize("way", ["storage daemon", "ssh", "tls"])
async def test_by_every_way(way, ssh_host, begin, start_destination, qemu_binary, vm_dir):
    source = await begin(extra=ROOM)
    there = {} if way == "storage daemon" else {"qemu": ssh_host.program(qemu_binary)}
    destination = await start_destination(source, extra=ROOM, **there)
    address, ends, options = destination.monitor_path, ({}, {}), {}
    if way == "ssh":
        address = ssh_host.address(destination)
    elif way == "tls":
        folder = make_credentials_of("psk", vm_dir / "tls")
        ends = [{"tls_creds": str(folder / end)} for end in ("client", "server")]
        options["over"] = f"nbds://{ssh_host.there}"
    else:
        options["storage_daemon"] = True
    means = MigrationMeans(pause_after=1.0)
    async with (
        qmpblock.connect(source.monitor_path, **ends[0]) as one,
        qmpblock.connect(address, **ends[1]) as other,
        busy(source),
        qmpblock.migrate(one, other, speed=SPEED, means=means, **options) as job,
    ):
        pass
    *_, paused = job.result.notices
    assert "the guest is paused until" in paused.text
    assert paused.at < job.result.stopped
    assert 0 < job.result.paused < job.result.longest_stall
    assert job.result.warnings == ()
    assert (await destination.execute("query-status"))["status"] == "running"
    await nothing_of_ours(destination)
    await writes_on(destination)


async def test_what_it_would_be(begin, start_destination):
    source = await begin()
    destination = await start_destination(source)
    command = ("migrate", source.monitor_path, destination.monitor_path, "--dry-run")
    words = ("--pause-after", "30", "--longest-pause", "5")
    code, out, err = await cli(*command, *words)
    assert code in (0, 4), err
    assert "where it has not gone over in 30 s the guest is paused" in out
    assert "s while the guest is paused" in out
    code, out, _ = await cli(*command, *words, "--json")
    schema = Path(__file__).parents[2] / "docs/schema/migration-plan.schema.json"
    planned = json.loads(out)
    Draft202012Validator(json.loads(schema.read_text())).validate(planned)
    assert planned["pause"] > 0
    code, _, err = await cli(*command, "--longest-pause", "5")
    assert code == 2
    assert "--pause-after" in err
