"""The verbs of `qmpblock job`, against a fake QEMU. Real jobs: live/test_job_commands.py."""

from dataclasses import replace

import pytest
from drawing import RUN, chain, record
from fake_objects import dead, fake_vm

from qmpblock.changes.identity import identify
from qmpblock.changes.journal import Journal
from qmpblock.errors import BusyError, NotFoundError, RecordError, RequestError
from qmpblock.jobcontrol import find_job, holder_of, steer
from qmpblock.qemu.jobstate import VERBS
from qmpblock.qemu.lock import Holder

STREAM, PIVOT = f"qmpblock-{RUN}-stream", f"qmpblock-{RUN}-pivot"
LOCK = "qmpblock-disk-vd0"


@pytest.fixture(autouse=True)
def state(tmp_path, monkeypatch):
    monkeypatch.setenv("QMPBLOCK_STATE", str(tmp_path / "state"))


def of(job, **changes):
    """Return the record of a change whose job this is."""
    return record(job=job, keeper="d0", top="d0", base="", **changes).as_json()


def streaming(status="running"):
    return chain("d0", "d1").job(STREAM, "stream", status, "d0", "d1")


@pytest.mark.parametrize(
    ("verb", "sent"),
    [
        ("pause", ("job-pause", {"id": STREAM})),
        ("resume", ("job-resume", {"id": STREAM})),
        ("cancel", ("job-cancel", {"id": STREAM})),
        ("speed", ("block-job-set-speed", {"device": STREAM, "speed": 5})),
    ],
)
@pytest.mark.parametrize("alive", [True, False])
async def test_what_is_passed_on(tmp_path, verb, sent, alive):
    """Also while its controller lives: it follows what happens to its job."""
    async with fake_vm(tmp_path / "q", streaming()) as (vm, qemu):
        holder = Holder.me(RUN, record=of(STREAM)) if alive else dead(RUN, record=of(STREAM))
        qemu.hold(LOCK, holder)
        said = await steer(vm, STREAM, verb, 5)
        assert STREAM in said
        assert qemu.verbs == [sent]


async def test_no_limit_is_said_so(tmp_path):
    async with fake_vm(tmp_path / "q", streaming()) as (vm, _):
        assert "no limit" in await steer(vm, STREAM, "speed", 0)


@pytest.mark.parametrize("verb", ["pause", "resume", "cancel", "complete", "speed"])
async def test_a_job_of_others_is_never_touched(tmp_path, verb):
    drawing = chain("d0", "d1").job("backup0", "backup", "ready", "d0")
    async with fake_vm(tmp_path / "q", drawing) as (vm, qemu):
        with pytest.raises(RequestError, match="not one of ours") as caught:
            await steer(vm, "backup0", verb)
        assert qemu.verbs == []
    assert caught.value.exit_code == 2


async def test_an_unknown_job_lists_those_that_there_are(tmp_path):
    async with fake_vm(tmp_path / "q", streaming()) as (vm, _):
        with pytest.raises(NotFoundError, match="no job x\\\\x1b") as caught:
            await find_job(vm, "x\x1b")
        assert caught.value.candidates == (f"{STREAM} (stream, running)",)
        assert (await find_job(vm, STREAM)).status == "running"


@pytest.mark.parametrize(
    ("verb", "status"),
    [
        ("pause", "pending"),
        ("resume", "concluded"),
        ("cancel", "aborting"),
        ("complete", "running"),
        ("finalize", "ready"),
        ("dismiss", "running"),
        ("speed", "waiting"),
    ],
)
async def test_a_verb_out_of_season(tmp_path, verb, status):
    async with fake_vm(tmp_path / "q", streaming(status)) as (vm, qemu):
        with pytest.raises(RequestError, match=f"is {status}, and {verb} takes") as caught:
            await steer(vm, STREAM, verb)
        assert qemu.verbs == []
    wanted = VERBS["set-speed" if verb == "speed" else verb]
    assert all(one in caught.value.message for one in wanted)


@pytest.mark.parametrize(("verb", "status"), [("finalize", "pending"), ("dismiss", "concluded")])
async def test_what_a_living_controller_does_by_itself(tmp_path, verb, status):
    """It flushes first (K6), and reads the verdict."""
    async with fake_vm(tmp_path / "q", streaming(status)) as (vm, qemu):
        qemu.hold(LOCK, Holder.me(RUN, record=of(STREAM)))
        with pytest.raises(BusyError, match=r"by itself: process \d+ on"):
            await steer(vm, STREAM, verb)
        assert qemu.verbs == []


def pivoting(status):
    return chain("d0", "d1").job(PIVOT, "commit", status, "d0", "d1")


def of_pivot():
    return record(
        operation="commit",
        pivot=True,
        job=PIVOT,
        top="d0",
        base="d1",
        top_file="/i/d0",
        base_file="/i/d1",
        images=("/i/d0", "/i/d1"),
    )


async def test_a_pivot_may_be_asked_for_while_its_controller_lives(tmp_path):
    """It sees that the job is pending, and finalizes it."""
    async with fake_vm(tmp_path / "q", pivoting("ready")) as (vm, qemu):
        qemu.hold(LOCK, Holder.me(RUN, record=of_pivot().as_json()))
        await steer(vm, PIVOT, "complete")
        assert [verb for verb, _ in qemu.verbs] == ["job-complete"]


async def test_a_pivot_for_which_the_vm_is_paused_is_its_controllers_alone(tmp_path):
    async with fake_vm(tmp_path / "q", pivoting("ready")) as (vm, qemu):
        its = replace(of_pivot(), nodes=(f"qmpblock-{RUN}-paused",))
        qemu.hold(LOCK, Holder.me(RUN, record=its.as_json()))
        with pytest.raises(BusyError, match="does that by itself"):
            await steer(vm, PIVOT, "complete")
        assert qemu.verbs == []


@pytest.mark.parametrize("operation", ["copy", "move"])
async def test_a_copys_job_is_not_asked_to_pivot_from_outside(tmp_path, operation):
    """It would hold the guest when nobody waits for that, or take it to the copy."""
    job = f"qmpblock-{RUN}-copy-0"
    drawn = chain("d0").job(job, "mirror", "ready", "d0")
    async with fake_vm(tmp_path / "q", drawn) as (vm, qemu):
        its = record(operation=operation, helpers=(job,))
        qemu.hold(LOCK, Holder.me(RUN, record=its.as_json()))
        with pytest.raises(BusyError, match="does that by itself"):
            await steer(vm, job, "complete")
        assert qemu.verbs == []


@pytest.mark.parametrize(("verb", "status"), [("complete", "ready"), ("finalize", "pending")])
async def test_a_pivot_whose_controller_died_is_not_left_pending(tmp_path, verb, status):
    """It would hold the guest's I/O until somebody comes (K5)."""
    async with fake_vm(tmp_path / "q", pivoting(status)) as (vm, qemu):
        qemu.pivot_to = "d1"
        its = replace(of_pivot(), vm=await identify(vm))
        Journal.create(its)  # without it nobody could tell afterwards which image is newest
        qemu.hold(LOCK, dead(RUN, record=its.as_json()))
        assert "brought to its end" in await steer(vm, PIVOT, verb)
        wanted = ["job-complete", "job-finalize", "job-dismiss"]
        assert [one for one, _ in qemu.verbs] == wanted[wanted.index(f"job-{verb}") :]
        assert qemu.objects == {}
        assert qemu.drawing.jobs == {}
    assert list((tmp_path / "state").glob("*.journal")) == []


async def test_a_concluded_job_of_a_dead_controller_is_dismissed_with_its_lock(tmp_path):
    async with fake_vm(tmp_path / "q", streaming("concluded")) as (vm, qemu):
        qemu.hold(LOCK, dead(RUN, record=of(STREAM)))
        await steer(vm, STREAM, "dismiss")
        assert [verb for verb, _ in qemu.verbs] == ["job-dismiss"]
        assert qemu.objects == {}


async def test_without_a_lock_a_job_that_pivots_nothing_is_just_dismissed(tmp_path):
    async with fake_vm(tmp_path / "q", streaming("concluded")) as (vm, qemu):
        assert await steer(vm, STREAM, "dismiss") == f"dismiss: {STREAM}"
        assert [verb for verb, _ in qemu.verbs] == ["job-dismiss"]


async def test_whose_job_it_is(tmp_path):
    drawing = streaming().job(f"qmpblock-{RUN}-create-0", "create", "running")
    async with fake_vm(tmp_path / "q", drawing) as (vm, qemu):
        job = await find_job(vm, STREAM)
        assert await holder_of(vm, job) is None
        qemu.objects["sec0"] = Holder.me(RUN, record=of(STREAM)).text()
        assert await holder_of(vm, job) is None
        # What is not understood may be its controller's, unless that is found.
        qemu.objects["qmpblock-disk-x"] = "a secret of somebody's"
        with pytest.raises(RecordError, match="qmpblock-disk-x"):
            await holder_of(vm, job)
        qemu.hold("qmpblock-disk-x", Holder.me("cafebabe", record=of(STREAM)))  # another run's
        with pytest.raises(RecordError, match="run"):
            await holder_of(vm, job)
        me = Holder.me(RUN, record=of(STREAM, helpers=(f"qmpblock-{RUN}-create-0",)))
        qemu.hold(LOCK, me)
        for name in (STREAM, f"qmpblock-{RUN}-create-0"):
            found = await holder_of(vm, await find_job(vm, name))
            assert found.text() == me.text()
