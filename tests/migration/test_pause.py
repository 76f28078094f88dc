"""When a guest is paused that outruns its migration, and for how long; by QEMU's answers."""

import asyncio

import pytest
from drawing import RUN, chain
from fake_objects import fake_vm

from qmpblock.errors import StalledError
from qmpblock.migration.job import MigrationJob
from qmpblock.migration.means import MigrationMeans
from qmpblock.migration.pause import Pause
from qmpblock.migration.states import Phase
from qmpblock.qemu.job import Progress

MIB = 1 << 20
MEMORY = {"query-memory-size-summary": {"return": {"base-memory": 60 * MIB, "plugged-memory": 0}}}


def state(status):
    return {"return": {"status": status, "running": status == "running"}}


async def told(
    tmp_path,
    act,
    *,
    after=0.01,
    longest=60.0,
    phase=Phase.MEMORY,
    rate=10 * MIB,
    stands="paused",
):
    """Return what the VM was told, and what was said, with 40 MiB to go at that rate.

    It shows `stands` after it was told to stop.
    """
    async with fake_vm(tmp_path / "q", chain("d0"), **MEMORY) as (vm, qemu):
        plain = qemu.get

        def get(command, default=None):
            if command in ("stop", "cont"):
                qemu["query-status"] = state(stands if command == "stop" else "running")
            return plain(command, default)

        qemu.get = get
        job = MigrationJob()
        job.show(Progress(phase.value, "", 0, 40 * MIB, rate=rate))
        means = MigrationMeans(pause_after=after, longest_pause=longest)
        pause = Pause(vm, RUN, means, job)
        before = len(qemu.fake.seen)
        try:
            await act(pause, qemu)
        finally:
            sent = [one["execute"] for one in qemu.fake.seen[before:]]
        changed = [one for one in sent if not one.startswith("query-")]
        return changed, [notice.text for notice in job.notices]


def hurry():
    pass


async def until_it_stands(pause, _):
    async with pause.at_the_deadline(hurry):
        async with asyncio.timeout(10):
            while not pause.stands:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.05)


async def at_its_end(pause, _):
    async with pause.at_the_deadline(hurry):
        await asyncio.sleep(30)


async def for_a_while(pause, _):
    async with pause.at_the_deadline(hurry):
        await asyncio.sleep(0.3)


@pytest.mark.parametrize(("phase", "takes"), [(Phase.MEMORY, "4.1"), (Phase.MIRRORING, "10.1")])
async def test_how_long_it_takes_is_said_before(tmp_path, phase, takes):
    """What is left of the disks, and then all of the memory; or what is left of that."""
    changed, said = await told(tmp_path, until_it_stands, phase=phase)
    assert changed == ["blockdev-add", "stop"]
    assert "where it has not gone over in 0.01 s" in said[0]
    assert f"that takes about {takes} s" in said[1]


async def test_one_that_stopped_itself_just_before_is_not_paused(tmp_path):
    """It would be continued as one that was (F42)."""
    changed, _ = await told(tmp_path, for_a_while, stands="io-error")
    assert changed == ["blockdev-add", "stop", "blockdev-del"]


async def test_what_is_written_during_a_pass_is_reckoned_with(tmp_path):
    """As much may be left at its end as at its beginning."""

    async def act(pause, qemu):
        async with pause.at_the_deadline(hurry):
            for left in (40, 8, 1):
                pause._job.show(Progress("memory", "", 0, left * MIB, rate=10 * MIB))
                await asyncio.sleep(0.25)
            assert not pause.stands
            for left in (20, 2):
                pause._job.show(Progress("memory", "", 0, left * MIB, rate=10 * MIB))
                await asyncio.sleep(0.25)
            assert pause.stands

    _, said = await told(tmp_path, act, longest=4.0)
    assert "that takes about 2.1 s" in said[-1]


async def test_it_goes_on_if_it_was_paused(tmp_path):
    async def act(pause, qemu):
        await pause.end()
        await until_it_stands(pause, qemu)
        await pause.end()
        await pause.end()

    changed, _ = await told(tmp_path, act)
    assert changed == ["blockdev-add", "stop", "cont", "blockdev-del"]


async def test_who_is_continued_by_somebody_else_is_theirs(tmp_path):
    async def act(pause, qemu):
        async with pause.at_the_deadline(hurry):
            async with asyncio.timeout(10):
                while "stop" not in [one["execute"] for one in qemu.fake.seen]:
                    await asyncio.sleep(0.01)
                qemu.fake.event("RESUME")
                while pause.stands:
                    await asyncio.sleep(0.01)
        await pause.end()

    changed, said = await told(tmp_path, act)
    assert changed == ["blockdev-add", "stop", "blockdev-del"]
    assert said[-1] == "somebody has continued the guest: it is not paused again"


async def test_it_stands_for_no_longer_than_it_may(tmp_path):
    with pytest.raises(StalledError, match=r"paused for 4\.2 s.*41943040 bytes are left"):
        await told(tmp_path, at_its_end, longest=4.2)


async def test_what_takes_longer_is_waited_for(tmp_path):
    changed, said = await told(tmp_path, for_a_while, longest=4.0)
    assert changed == []
    assert "not paused yet: what is left would take about 4.1 s, and it may be for 4 s" in said[1]
    assert len(said) == 2


async def test_what_would_have_helped_is_said(tmp_path):
    async def act(pause, _):
        async with pause.at_the_deadline(hurry):
            await asyncio.sleep(0.3)
            raise StalledError("it does not converge", remedy="let it do less")

    with pytest.raises(StalledError) as failed:
        await told(tmp_path, act, longest=4.0)
    assert failed.value.remedy == (
        "let it do less; or let it be paused for as long as it takes (--longest-pause 4)"
    )


async def test_where_nothing_is_known_nothing_is_done(tmp_path):
    changed, said = await told(tmp_path, for_a_while, rate=0.0)
    assert (changed, len(said)) == ([], 1)


async def test_who_is_stopped_by_somebody_else_is_not_touched(tmp_path):
    async def act(pause, qemu):
        qemu["query-status"] = state("paused")
        await for_a_while(pause, qemu)
        assert not pause.stands
        await pause.end()

    assert (await told(tmp_path, act))[0] == []


async def test_unasked_nothing_is_done(tmp_path):
    assert await told(tmp_path, for_a_while, after=0.0) == ([], [])
