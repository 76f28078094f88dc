"""What a manager is not asked to copy, and how near a guest is when it is paused. Else: live."""

from types import SimpleNamespace

import pytest
from drawing import chain

from qmpblock.changes.known import NEAR
from qmpblock.copying import managed
from qmpblock.copying.job import CopyJob
from qmpblock.copying.managed import _ManagersJob, check_asked
from qmpblock.copying.options import CopyOptions
from qmpblock.copying.plan import plan_copy
from qmpblock.copying.shape import Shape
from qmpblock.errors import Error, JobError, UnsupportedError
from qmpblock.qemu.job import Progress

M = 1 << 20


class Lender:
    """What libvirt says of its disks, and of its job on one."""

    def __init__(self, file="/i/d0", job=None, later=None):
        self.file = file
        self.later = {"vda": file} if later is None else later
        self.now = job

    async def targets(self):
        return {"vda": "vd0"}

    async def files(self):
        return {"vda": self.file}, self.later

    async def job(self, name):
        return self.now

    async def limit(self, name, speed):
        raise Error("libvirt did not limit its job")


def lent(lender):
    async def through(ask):
        return await ask(lender)

    return SimpleNamespace(monitor=SimpleNamespace(through=through), stall=1)


def plan(drawn, fmt="qcow2", **shape):
    device = drawn.graph().device("vd0")
    return plan_copy(device, "/i/new", fmt, "all", pivot=True, shape=Shape(**shape))


@pytest.fixture
def drawn():
    drawing = chain("d0", "d1")
    drawing.nodes["d0"]["detect_zeroes"] = "off"
    return drawing


async def test_what_libvirt_is_asked_for(drawn):
    for fmt, shape in (("qcow2", {}), ("raw", {"allocation": "full"}), ("raw", {})):
        await check_asked(lent(Lender()), plan(drawn, fmt, **shape), CopyOptions(pivot=True))


async def refusal(drawn, lender=None, *, resume=False, **shape):
    options = CopyOptions(pivot=True, resume=resume)
    with pytest.raises(UnsupportedError) as refused:
        await check_asked(lent(lender or Lender()), plan(drawn, **shape), options)
    assert "nothing was touched" in str(refused.value.standing)
    return f"{refused.value.message}: {refused.value.remedy}"


async def test_what_it_is_not(drawn):
    assert "leave --resume out" in await refusal(drawn, resume=True)
    assert "go over to a raw one" in await refusal(drawn, allocation="full")
    assert "virsh blockcopy" in await refusal(drawn, Lender(file=""))
    said = await refusal(drawn, Lender(later={"vda": "/i/other"}))
    assert "takes /i/d0 for the image of vda, but /i/other at the next start" in said


async def test_one_that_was_plugged_into_the_running_vm_alone(drawn):
    await check_asked(lent(Lender(later={})), plan(drawn), CopyOptions(pivot=True))


async def test_below_a_filter(drawn):
    drawn.filter("cor", "copy-on-read", "d0").device("cor")
    said = await refusal(drawn)
    assert "below a filter (copy-on-read): virsh blockcopy DOMAIN vda" in said


async def test_zeros_that_would_be_taken_away(drawn):
    drawn.nodes["d0"]["detect_zeroes"] = "unmap"
    assert "leave --allocation like out" in await refusal(drawn, allocation="like")
    await check_asked(lent(Lender()), plan(drawn), CopyOptions(pivot=True))


def job_of(lender, events=()):
    left = list(events)

    async def get(timeout):
        return left.pop(0) if left else pytest.fail("no more events are asked for")

    vm = lent(lender)
    vm.monitor.version = (7, 2, 0)
    vm.monitor.subscribe = lambda *_, **__: SimpleNamespace(get=get, close=lambda: None)
    drawing = chain("d0").graph().device("vd0")
    disk = SimpleNamespace(vm=vm, name="vd0", chain=drawing.chain)
    return _ManagersJob(disk, "vda", CopyJob())


@pytest.mark.parametrize(("rate", "near"), [(0, M), (M // 2, M), (4 * M, 4 * M), (1 << 40, NEAR)])
def test_what_is_left_takes_no_longer_than_the_guest_may_be_paused(monkeypatch, rate, near):
    at = [0.0]
    monkeypatch.setattr(managed.time, "monotonic", lambda: at[0])
    job = job_of(Lender())
    for second in range(3):
        at[0] = float(second)
        job.show(Progress("running", "copying", rate * second, rate * 10))
    assert job.manager.near == near
    assert (job.progress.rate, job.progress.eta) == (rate, 8.0 if rate else None)


async def test_a_job_that_failed_does_so_in_qemus_words():
    failed = {"event": "BLOCK_JOB_COMPLETED", "data": {"error": "No space left on device"}}
    job = job_of(Lender(), [failed])
    with pytest.raises(JobError, match=r"copy-vda-d0 \(mirror\) failed: No space left"):
        await job.catch_up()


async def test_the_speed_of_one_that_is_over_is_none():
    """It may have come to its end since."""
    await job_of(Lender()).set_speed(0)
    with pytest.raises(Error, match="did not limit"):
        await job_of(Lender(job=(0, 1))).set_speed(0)
