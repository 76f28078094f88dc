"""What is done on request for a migration to end: it takes effect, is said, and is put back."""

import asyncio
import contextlib
import json
import os
import signal
from pathlib import Path

import pytest
from chains import cli
from disturbed import writes_on
from jsonschema import Draft202012Validator
from migrating import arrived, both, dies_in, machine, migrated, slow_wire, stressed

import qmpblock
from qmpblock import MigrationMeans
from qmpblock.errors import StalledError
from qmpblock.migration.storage import Storage
from qmpblock.testing import Tools, build, parse_scenario

pytestmark = pytest.mark.live

MIB = 1 << 20
SCHEMA = json.loads((Path(__file__).parents[2] / "docs/schema/migrate.schema.json").read_text())


@pytest.fixture
def begin(start_qemu, vm_dir, qemu_binary):
    async def start(rate=300, **options):
        built = await build(
            parse_scenario(machine(), "source"), vm_dir / "source", Tools.of(qemu_binary)
        )
        return await stressed(await start_qemu(built, guest=True, **options), rate)

    return start


async def settings(vm):
    """Return the capabilities and the parameters of a VM's migrations."""
    listed = await vm.execute("query-migrate-capabilities")
    states = {one["capability"]: one["state"] for one in listed}
    return states, await vm.execute("query-migrate-parameters")


@contextlib.asynccontextmanager
async def writing(vm, mib):
    """Have the guest write to so much of its memory, again and again."""

    async def write():
        while True:
            await vm.guest.dirty(mib)

    task = asyncio.create_task(write())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_they_take_effect_are_said_and_are_put_back(begin, start_destination):
    source = await begin()
    before = await settings(source)
    destination = await start_destination(source)
    words = ("--downtime-limit", "450", "--auto-converge", "--speed", "100M", "--json")
    code, out, err = await cli("migrate", source.monitor_path, destination.monitor_path, *words)
    assert code == 0, err
    told = json.loads(out)
    Draft202012Validator(SCHEMA).validate(told)
    limit, slower = told["notices"]
    assert "450 ms" in limit["text"]
    assert "CPUs are slowed down" in slower["text"]
    assert 0 < limit["at"] < told["stopped"]
    for one in (limit, slower):
        assert f"migration: {one['text']}" in err
    set_ = [line for line in source.qmp_log() if "migrate-set-parameters" in line]
    assert '"downtime-limit": 450' in set_[0]
    assert await settings(source) == before
    guest = await destination.attach_guest()
    await guest.stop_stress(0)


@pytest.mark.parametrize("phase", ["mirroring", "held", "sent", "landed"])
async def test_they_are_put_back_after_kill_9(phase, begin, start_destination):
    source = await begin()
    before = await settings(source)
    destination = await start_destination(source)
    destination.expect_exit()
    means = {"downtime_limit": 0.5, "auto_converge": True}
    await dies_in(phase, source, destination, speed=200 << 20, means=means)
    if phase != "mirroring":
        assert await settings(source) != before
    recovered = await qmpblock.recover_migration(source.monitor_path)
    assert recovered.done is False
    assert await settings(source) == before
    destination = await start_destination(source)
    async with both(source, destination) as vms, qmpblock.migrate(*vms) as job:
        pass
    await arrived(source, destination, job.result)


async def test_a_longer_standstill_lets_a_busy_guest_over(begin, start_destination):
    """At 16 MiB/s what it writes all the time needs a second; it is not let stand for that long."""
    source = await begin(extra=["-m", "64"])
    before = await settings(source)
    async with writing(source, 16):
        destination = await start_destination(source, extra=["-m", "64"])
        destination.expect_exit()
        with pytest.raises(StalledError, match="does not converge") as failed:
            await migrated(source, destination, stall=4, speed=16 * MIB)
        assert "written: " in failed.value.message
        assert "not measured" not in failed.value.message
        assert "--auto-converge" in failed.value.remedy
        assert await settings(source) == before
        destination = await start_destination(source, extra=["-m", "64"])
        async with both(source, destination) as vms:
            means = MigrationMeans(downtime_limit=3.0)
            async with qmpblock.migrate(*vms, speed=16 * MIB, means=means) as job:
                pass
    print(job.result.downtime, job.result.passes)
    assert job.result.downtime < 10
    assert await settings(source) == before


@pytest.mark.parametrize("words", [["--downtime-limit", "6000"], ["--downtime-limit", "0"]])
async def test_what_cannot_be_is_refused(words, begin, start_destination):
    source = await begin()
    destination = await start_destination(source)
    code, _, err = await cli("migrate", source.monitor_path, destination.monitor_path, *words)
    assert code == 2, err
    assert not any("object-add" in line for line in source.qmp_log())


async def test_a_guest_that_outruns_the_mirrors(begin, start_destination, invariant):
    """It ends within a bound, with the figures, and leaves nothing."""
    source = await begin()
    await invariant.begin(source)
    destination = await start_destination(source)
    with pytest.raises(StalledError, match="does not converge") as failed:
        await migrated(source, destination, stall=4, speed=512 << 10)
    print(failed.value)
    assert "to be copied anew: " in failed.value.message
    assert failed.value.remedy.startswith("let the guest write less, raise --speed, have its")
    assert "the guest runs at the source, where nothing of ours is left" in failed.value.standing
    await invariant.verify(source)
    assert (await destination.execute("query-status"))["status"] == "inmigrate"
    assert (await source.guest.stop_stress(0)).bad == 0


@pytest.mark.needs_qemu(">= 8.2", reason="block-job-change")
async def test_writes_that_wait_let_the_disks_catch_up(begin, start_destination, monkeypatch):
    source = await begin(rate=900)
    destination = await start_destination(source)
    async with slow_wire(monkeypatch, 2 * MIB):
        means = MigrationMeans(write_blocking_after=5.0)
        result = await migrated(source, destination, means=means)
    [notice] = result.notices
    assert "writes wait from now on" in notice.text
    assert 5.0 < notice.at < result.stopped
    changes = [line for line in source.qmp_log() if '"execute": "block-job-change"' in line]
    assert '"write-blocking"' in changes[0]
    await arrived(source, destination, result)


@pytest.mark.needs_qemu(">= 8.2", reason="block-job-change")
@pytest.mark.parametrize("how", ["dies", "falls silent"])
async def test_writes_that_wait_for_a_lost_destination_go_on(
    how, begin, start_destination, invariant, monkeypatch
):
    """Though the guest waits for each of its writes to be there."""
    source = await begin(rate=900)
    await invariant.begin(source)
    destination = await start_destination(source)
    destination.expect_exit()
    have_writes_wait = Storage.have_writes_wait

    async def then(self):
        await have_writes_wait(self)
        os.kill(destination.pid, signal.SIGKILL if how == "dies" else signal.SIGSTOP)

    monkeypatch.setattr(Storage, "have_writes_wait", then)
    async with slow_wire(monkeypatch, 2 * MIB):
        with pytest.raises(qmpblock.Error) as failed:
            await migrated(source, destination, means=MigrationMeans(write_blocking_after=2.0))
    print(failed.value)
    assert "the guest runs at the source" in failed.value.standing
    await writes_on(source.guest)
    if how != "dies":
        os.kill(destination.pid, signal.SIGCONT)
        await destination.kill()
    await invariant.verify(source)
    assert (await source.guest.stop_stress()).errors == 0


@pytest.mark.needs_qemu(">= 8.2", reason="block-job-change")
async def test_writes_need_not_wait_where_the_disks_are_there(begin, start_destination):
    source = await begin()
    destination = await start_destination(source)
    result = await migrated(source, destination, means=MigrationMeans(write_blocking_after=30.0))
    assert result.notices == ()
    await arrived(source, destination, result)


@pytest.mark.needs_qemu("< 8", reason="it has no block-job-change")
async def test_where_writes_cannot_be_had_wait_it_is_refused(begin, start_destination, invariant):
    source = await begin()
    await invariant.begin(source)
    destination = await start_destination(source)
    words = ("--write-blocking-after", "5")
    for form in ((), ("--dry-run",)):
        command = ("migrate", source.monitor_path, destination.monitor_path, *form, *words)
        code, _, err = await cli(*command)
        assert code == 2
        assert "it has no block-job-change" in err
    await invariant.verify(source)
