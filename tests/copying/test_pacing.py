"""What is read of QEMU's counters, and who sets the speed of a copy's jobs by it."""

import asyncio
from types import SimpleNamespace

import pytest

from qmpblock.copying.job import CopyJob
from qmpblock.copying.latency import Counted, Pacer
from qmpblock.copying.pacing import counted, paced
from qmpblock.errors import CommandError
from qmpblock.qemu.job import Progress

MIB = 1 << 20
VD0 = "/machine/peripheral/vd0/virtio-backend"
VD1 = "/machine/peripheral/vd1"


def disk(path):
    return SimpleNamespace(qom_path=path)


def entry(qdev, reads, read_ns, writes, write_ns):
    stats = {
        "rd_operations": reads,
        "rd_total_time_ns": read_ns,
        "wr_operations": writes,
        "wr_total_time_ns": write_ns,
    }
    return {"device": "", "qdev": qdev, "stats": stats}


def test_each_disk_is_counted_by_reads_and_writes():
    stats = [
        entry(VD0, 10, 5_000_000, 20, 40_000_000),
        entry("vd1", 1, 1, 2, 3_000_000_000),
        entry("/machine/peripheral/vd10", 9, 9, 9, 9),
        {"device": "cd0", "stats": {}},
    ]
    found = counted(stats, [disk(VD0), disk(VD1)])
    assert found == {
        f"read {VD0}": Counted(10, pytest.approx(0.005)),
        f"write {VD0}": Counted(20, pytest.approx(0.04)),
        f"read {VD1}": Counted(1, pytest.approx(1e-9)),
        f"write {VD1}": Counted(2, pytest.approx(3.0)),
    }


def test_a_histogram_of_somebodys_is_read():
    one = entry(VD0, 10, 5_000_000, 20, 40_000_000)
    one["stats"]["wr_latency_histogram"] = {"boundaries": [10**6, 10**9], "bins": [3, 2, 15]}
    found = counted([one], [disk(VD0)])
    assert found[f"read {VD0}"].edges == ()
    assert found[f"write {VD0}"].edges == pytest.approx((0.001, 1.0))
    assert found[f"write {VD0}"].bins == (3, 2, 15)


@pytest.mark.parametrize(
    "said",
    [
        None,
        [],
        {},
        {"boundaries": [1, 2], "bins": [1, 2]},
        {"boundaries": [2, 1], "bins": [1, 2, 3]},
        {"boundaries": [1, 1], "bins": [1, 2, 3]},
        {"boundaries": [1, "2"], "bins": [1, 2, 3]},
        {"boundaries": 7, "bins": [1]},
    ],
)
def test_what_is_no_histogram_is_none(said):
    one = entry(VD0, 10, 5_000_000, 20, 40_000_000)
    one["stats"]["rd_latency_histogram"] = said
    assert counted([one], [disk(VD0)])[f"read {VD0}"] == Counted(10, pytest.approx(0.005))


@pytest.mark.parametrize(
    "stats", [{}, None, [], {"rd_operations": "many", "rd_total_time_ns": 1}, {"rd_operations": 1}]
)
def test_what_is_no_number_is_not_counted(stats):
    assert counted([{"qdev": VD0, "stats": stats}, {"qdev": VD0}], [disk(VD0)]) == {}


class SlowingDisk:
    """A QEMU whose guest waits 80 ms for each request, whatever is done."""

    def __init__(self):
        self.requests = 0

    async def execute(self, command):
        assert command == "query-blockstats"
        self.requests += 50
        return [entry(VD0, self.requests, self.requests * 80_000_000, 0, 0)]


class FakeJob:
    def __init__(self, name, status="running"):
        self.id = name
        self.progress = Progress(status, "", 0, 100)
        self.speeds = []

    async def set_speed(self, speed):
        self.speeds.append(speed)


def copy_of(*jobs, wanted=0.02, speed=0):
    job = CopyJob((), Pacer(wanted, speed) if wanted else None)
    job.speed = speed
    job.runs(jobs)
    return job


async def pace(job, seconds, work=None):
    vm = SimpleNamespace(monitor=SlowingDisk())
    targets = [SimpleNamespace(plan=SimpleNamespace(device=disk(VD0)))]
    await paced(vm, job, targets, work or (lambda: asyncio.sleep(seconds)))


async def test_every_job_gets_its_share_of_what_the_guest_bears():
    first, second = FakeJob("a"), FakeJob("b", "ready")
    job = copy_of(first, second)
    job.publish("vd0", first.progress)
    await pace(job, 0.7)
    assert first.speeds == second.speeds
    assert first.speeds[-1] < first.speeds[0] == 4 * MIB
    job.publish("vd0", first.progress)
    assert job.progress.latency == pytest.approx(0.08)
    assert job.progress.limit == 2 * first.speeds[-1]


async def test_without_a_latency_nobody_looks():
    only = FakeJob("a")
    await pace(copy_of(only, wanted=0), 0.3)
    assert only.speeds == []


async def test_one_that_has_ended_since_is_no_failure():
    running, over, made = FakeJob("a"), FakeJob("b", "concluded"), FakeJob("c")
    ending = FakeJob("d")
    made.progress = None

    async def fails(speed):
        raise CommandError("block-job-set-speed", {}, "GenericError", "not now")

    ending.set_speed = fails
    await pace(copy_of(running, over, made, ending), 0.3)
    assert running.speeds
    assert over.speeds == made.speeds == []


async def test_the_failure_of_the_work_is_said():
    async def fail():
        await asyncio.sleep(0.01)
        raise KeyError("it")

    with pytest.raises(KeyError, match="it"):
        await pace(copy_of(FakeJob("a")), 0, fail)


async def test_what_holds_the_guest_is_not_slowed_down():
    only = FakeJob("a")
    job = copy_of(only, speed=64 * MIB)
    assert job.share() == 8 * MIB
    await job.hurry()
    assert only.speeds == [64 * MIB]
    await pace(job, 0.6)
    assert only.speeds == [64 * MIB]
    job.runs((FakeJob("b"),))  # and again, where it is tried again
    assert job.share() < 8 * MIB


async def test_a_speed_is_a_limit_also_of_the_pacer():
    only = FakeJob("a")
    job = copy_of(only)
    await job.set_speed(3 * MIB)
    await job.keep_to_speed()
    assert only.speeds == [3 * MIB]
    await job.set_speed(0)
    assert only.speeds[-1] == 8 * MIB
