"""Following a job, against a scripted QEMU. Real jobs: live/test_job_control.py and others."""

import asyncio
import contextlib
import json
import re
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from fake_qmp import GREETING, fake_qmp

import qmpblock
from qmpblock.cancellation import undisturbed
from qmpblock.errors import CommandError, JobError, StalledError
from qmpblock.qemu import job as module
from qmpblock.qemu.job import Job, Progress
from qmpblock.qemu.monitor import Monitor

NAME = "qmpblock-deadbeef-stream"
OLD, NEW = 7, 11


class Script(dict):
    """What the peer says of its jobs: the next of several looks, the last of them for ever.

    A look is None (the job is gone), or a dict that goes into both replies; a string in it
    says which error the next verbs meet.
    """

    def __init__(self, looks):
        super().__init__({"qmp_capabilities": {"return": {}}})  # an empty one would not be asked
        self.looks = list(looks)
        self.count = 0
        self.seen = None
        self.refuse = {}
        self.verbs = []
        self.on_verb = {}

    def now(self):
        return self.looks[min(self.count, len(self.looks) - 1)]

    def get(self, command, default=None):  # what FakeQMP asks
        if command == "query-jobs":
            found = self.seen = self.now()
            self.count += 1
            return {"return": [] if found is None else [{"id": NAME, "type": "x", **found[0]}]}
        if command == "query-block-jobs":  # of the same look
            found = self.seen
            return {"return": [] if found is None else [{"device": NAME, **found[1]}]}
        if command.startswith(("job-", "block-job-")):
            self.verbs.append(command)
            self.on_verb.get(command, lambda: None)()
            if command in self.refuse:
                return {"error": {"class": "GenericError", "desc": self.refuse[command]}}
        return super().get(command, default)


def look(status, done=0, total=100, *, error=None, **block):
    """Return what both queries say at one look."""
    told = {"status": status, "current-progress": done, "total-progress": total}
    return (told | ({"error": error} if error is not None else {}), block)


class Impatient:
    """A monitor whose jobs may stand still for less long than its answers may take."""

    def __init__(self, monitor, stall):
        self._monitor, self.stall = monitor, stall

    def __getattr__(self, name):
        return getattr(self._monitor, name)


@asynccontextmanager
async def following(tmp_path, looks, *, version=NEW, stall=60.0, kind="stream"):
    """Yield the job, its script and the peer."""
    greeting = json.loads(json.dumps(GREETING))
    greeting["QMP"]["version"]["qemu"]["major"] = version
    script = Script(looks)
    path = tmp_path / "q"
    async with (
        asyncio.timeout(120),  # a job that is never seen to end would be followed for ever
        fake_qmp(path, json.dumps(greeting).encode() + b"\n", script) as fake,
        await Monitor.connect(str(path)) as monitor,
    ):
        job = Job(Impatient(monitor, stall), NAME, kind)
        try:
            yield job, script, fake
        finally:
            job.end()


async def whole(job, converging=60.0):
    return [seen async for seen in job.follow(converging=converging)]


@pytest.fixture
def fast(monkeypatch):
    """Have ticks and retries take no time."""
    monkeypatch.setattr(module, "_TICK", 0.001)
    monkeypatch.setattr(module, "_RETRY", 0.0)


@pytest.mark.usefixtures("fast")
async def test_from_its_start_to_its_verdict(tmp_path):
    looks = [
        look("created"),
        look("running", 10),
        look("running", 60),
        look("waiting", 100),
        look("pending", 100),
        look("concluded", 100),
    ]
    async with following(tmp_path, looks) as (job, _, _):
        seen = await whole(job)
    assert [one.status for one in seen] == [found[0]["status"] for found in looks]
    assert [one.phase for one in seen] == [
        "copying",
        "copying",
        "copying",
        "finishing",
        "finishing",
        "ended",
    ]
    assert [one.remaining for one in seen[:3]] == [100, 90, 40]
    assert seen[-1].error is None
    assert job.progress is seen[-1]


@pytest.mark.usefixtures("fast")
async def test_the_verdict_is_what_query_jobs_says(tmp_path):
    """BLOCK_JOB_COMPLETED comes with failures, too, and events may be lost."""
    looks = [look("running", 50), look("concluded", 50, error="No space left on device")]
    async with following(tmp_path, looks) as (job, _, fake):
        fake.event("BLOCK_JOB_COMPLETED", device=NAME, type="stream")
        seen = await whole(job)
    assert seen[-1].error == "No space left on device"


@pytest.mark.usefixtures("fast")
async def test_what_others_do_is_no_event_of_ours(tmp_path):
    async with following(tmp_path, [look("running", 1)] * 3 + [None], version=OLD) as (job, _, fk):
        fk.event("BLOCK_JOB_CANCELLED", device="backup0")
        fk.event("BLOCK_JOB_ERROR", device="backup0")
        fk.event("BLOCK_JOB_COMPLETED", device="backup0", error="theirs")
        seen = await whole(job)
    assert seen[-1].error is None
    assert seen[-1].errors == 0


@pytest.mark.usefixtures("fast")
async def test_io_errors_are_counted(tmp_path):
    async with following(tmp_path, [look("running", 1)] * 5 + [look("concluded")]) as (job, _, fk):
        for _ in range(3):
            fk.event("BLOCK_JOB_ERROR", device=NAME, operation="write", action="stop")
        seen = await whole(job)
    assert seen[-1].errors == 3


async def test_what_comes_during_a_look_has_it_look_again_at_once(tmp_path, monkeypatch):
    """What that look saw may be older than the event; else the end is seen a tick late."""
    monkeypatch.setattr(module, "_TICK", 3600.0)
    async with following(tmp_path, [look("pending"), look("concluded")]) as (job, script, fake):
        real = script.get

        def get(command, default=None):
            if command == "query-jobs" and script.count == 0:
                fake.event("JOB_STATUS_CHANGE", id=NAME, status="concluded")
            return real(command, default)

        script.get = get
        seen = await whole(job)
    assert [one.status for one in seen] == ["pending", "concluded"]


# out of room


@pytest.mark.usefixtures("fast")
async def test_after_enospc_it_is_resumed_until_it_runs(tmp_path):
    """`cont` of the VM resets io-status, and the job stays paused: still it is full."""
    looks = [
        look("running", 10, **{"io-status": "ok"}),
        look("paused", 10, **{"io-status": "nospace"}),
        look("paused", 10, **{"io-status": "ok"}),
        look("paused", 10, **{"io-status": "ok"}),
        look("running", 20, **{"io-status": "ok"}),
        look("concluded", 100),
    ]
    async with following(tmp_path, looks) as (job, script, _):
        seen = await whole(job)
    assert [one.phase for one in seen] == [
        "copying",
        "waiting for room",
        "waiting for room",
        "waiting for room",
        "copying",
        "ended",
    ]
    assert script.verbs == ["job-resume"] * 3


@pytest.mark.usefixtures("fast")
async def test_what_somebody_paused_is_not_resumed(tmp_path):
    looks = [look("running", 10), *[look("paused", 10, **{"io-status": "ok"})] * 5]
    async with following(tmp_path, [*looks, look("concluded")]) as (job, script, _):
        seen = await whole(job)
    assert script.verbs == []
    assert {one.phase for one in seen[1:-1]} == {"paused"}


@pytest.mark.usefixtures("fast")
async def test_once_it_ran_a_pause_is_a_pause_again(tmp_path):
    looks = [
        look("paused", 10, **{"io-status": "nospace"}),
        look("running", 20, **{"io-status": "ok"}),
        look("paused", 20, **{"io-status": "ok"}),
        look("paused", 20, **{"io-status": "ok"}),
        look("concluded"),
    ]
    async with following(tmp_path, looks) as (job, script, _):
        seen = await whole(job)
    assert [one.phase for one in seen[2:4]] == ["paused", "paused"]
    assert script.verbs == ["job-resume"]


@pytest.mark.usefixtures("fast")
async def test_a_resume_that_comes_too_late_is_no_failure(tmp_path):
    looks = [*[look("paused", 10, **{"io-status": "nospace"})] * 3, look("concluded", 100)]
    async with following(tmp_path, looks) as (job, script, _):
        script.refuse["job-resume"] = "Can't resume a job that was not paused"
        assert (await whole(job))[-1].status == "concluded"


@pytest.mark.usefixtures("fast")
async def test_waiting_for_room_is_no_stall(tmp_path):
    """It may take the operator all night."""
    async with following(tmp_path, [look("paused", 10, **{"io-status": "nospace"})], stall=2) as (
        job,
        _,
        _,
    ):
        clock = asyncio.get_running_loop().time
        began = clock()
        async for seen in job.follow(converging=60):
            assert seen.idle == 0
            if clock() - began > 2.3:
                break


@pytest.mark.usefixtures("fast")
async def test_a_ready_job_that_met_enospc_is_resumed_too(tmp_path):
    looks = [
        look("ready", 10, **{"io-status": "ok"}),
        look("standby", 10, **{"io-status": "nospace"}),
        look("ready", 20, **{"io-status": "ok"}),
        look("concluded", 100),
    ]
    async with following(tmp_path, looks, kind="mirror") as (job, script, _):
        seen = await whole(job)
    assert [one.phase for one in seen] == ["ready", "waiting for room", "ready", "ended"]
    assert script.verbs == ["job-resume"]


# where a job must not end by itself (K34)


@pytest.mark.parametrize(
    ("version", "policies"), [(OLD, {"stop"}), (NEW, {"report", "enospc"})], ids=["old", "new"]
)
async def test_what_qemu_is_to_do_at_an_error(tmp_path, version, policies):
    async with following(tmp_path, [None], version=version, kind="mirror") as (job, _, _):
        assert {job.on_error("report"), job.on_error("enospc")} == policies


@pytest.mark.parametrize(
    ("kind", "halted", "what"),
    [
        ("mirror", "paused", "write"),
        ("mirror", "standby", "write"),
        ("stream", "paused", "request"),
    ],
)
@pytest.mark.usefixtures("fast")
async def test_what_stopped_by_an_error_is_cancelled(tmp_path, kind, halted, what):
    """Not before it stands: its other requests are under way. QEMU's verdict would be ours."""
    failed = {"io-status": "failed"}
    looks = [
        look("running", 10, **{"io-status": "ok"}),
        look("running", 10, **failed),
        look(halted, 10, **failed),
        look(halted, 10, **failed),  # as `cancel` sees it
        look("aborting", 10, **failed),
        look("concluded", 10, error="Operation canceled"),
    ]
    async with following(tmp_path, looks, kind=kind) as (job, script, fake):
        at = {}
        script.on_verb["job-cancel"] = lambda: at.update(count=script.count)
        fake.event("BLOCK_JOB_ERROR", device=NAME, operation="write", action="stop")
        seen = await whole(job)
    assert script.verbs == ["job-cancel"]
    assert at["count"] > 2
    assert seen[-1].error == f"I/O error (a {what} failed; this QEMU says no more of it)"


@pytest.mark.usefixtures("fast")
async def test_a_job_that_stopped_before_a_cont_is_asked_again(tmp_path):
    """`cont` resets io-status: what it was is not known any more, until it meets it again."""
    well, failed = {"io-status": "ok"}, {"io-status": "failed"}
    standing = [look("paused", 10, **well, paused=True)]
    async with following(tmp_path, standing, kind="mirror") as (job, script, fake):

        def then(*looks):
            script.looks, script.count = list(looks), 0

        script.on_verb["job-resume"] = lambda: then(
            look("running", 10, **well, paused=False), look("paused", 10, **failed, paused=True)
        )
        script.on_verb["job-cancel"] = lambda: then(look("concluded", error="Operation canceled"))
        fake.event("BLOCK_JOB_ERROR", device=NAME, operation="read", action="stop")
        seen = await whole(job)
    assert script.verbs == ["job-resume", "job-cancel"]
    assert {one.phase for one in seen} == {"paused", "copying", "ended"}
    assert "a read failed" in seen[-1].error


@pytest.mark.usefixtures("fast")
async def test_what_succeeded_all_the_same_is_no_failure(tmp_path):
    """Its end, and not what was seen on the way, is the verdict."""
    looks = [*[look("paused", 10, **{"io-status": "failed"})] * 2, look("concluded", 100)]
    async with following(tmp_path, looks, kind="mirror") as (job, _, _):
        assert (await whole(job))[-1].error is None


# stalls


@pytest.mark.parametrize("status", ["running", "created", "waiting", "aborting", "unheard-of"])
@pytest.mark.usefixtures("fast")
async def test_what_should_move_and_does_not_has_stalled(tmp_path, status):
    async with following(tmp_path, [look(status, 10)], stall=0.5) as (job, _, _):
        with pytest.raises(StalledError, match=rf"is {status} and has not moved for 0\.5 s"):
            await whole(job)
        assert job.progress.idle > 0.5


@pytest.mark.parametrize("status", ["paused", "standby", "ready", "pending"])
@pytest.mark.usefixtures("fast")
async def test_what_waits_for_somebody_has_not(tmp_path, status):
    async with following(tmp_path, [look(status, 10)], stall=0.5) as (job, _, _):
        clock = asyncio.get_running_loop().time
        began = clock()
        async for seen in job.follow(converging=60):
            assert seen.idle == 0
            if clock() - began > 0.8:
                break


@pytest.mark.parametrize("status", ["paused", "standby"])
@pytest.mark.usefixtures("fast")
async def test_what_waits_for_somebody_does_not_hold_up_who_wants_to_end(tmp_path, status):
    """An interrupted command brings the guest home first, and does not wait all night for room."""
    looks = [look(status, 10, **{"io-status": "nospace"}), look("running", 10)]
    async with following(tmp_path, looks, stall=1.5) as (job, script, _):
        script.now = lambda: looks[script.count % 2]  # resumed, it comes to be full again
        task = asyncio.create_task(undisturbed(whole(job)))
        await asyncio.sleep(1.8)
        assert not task.done()
        task.cancel()
        await asyncio.sleep(0.1)
        assert not task.done()
        with pytest.raises(StalledError, match="has not moved"):
            await asyncio.wait_for(asyncio.shield(task), 30)


@pytest.mark.usefixtures("fast")
async def test_a_pivot_that_was_asked_for_must_come(tmp_path):
    async with following(tmp_path, [look("ready", 10)], stall=0.5, kind="commit") as (job, _, _):
        job.complete()
        with pytest.raises(StalledError, match="is ready"):
            await whole(job)


@pytest.mark.usefixtures("fast")
async def test_a_slow_job_rests_and_has_not_stalled(tmp_path):
    """At one megabyte a second QEMU writes sixteen, and rests for as many seconds."""
    looks = [look("running", 10, speed=16 << 20)]
    async with following(tmp_path, looks, stall=0.5) as (job, _, _):
        clock = asyncio.get_running_loop().time
        began = clock()
        with pytest.raises(StalledError):
            await whole(job)
        assert clock() - began > 1.4  # its rest, and the stall limit after that


@pytest.mark.usefixtures("fast")
async def test_a_growing_total_is_a_movement(tmp_path):
    """The guest writes on: the job has more to do, and lives."""
    looks = [look("running", 10, 100 + n) for n in range(300)]
    async with following(tmp_path, [*looks, look("concluded")], stall=5) as (job, _, _):
        seen = await whole(job)
    assert {one.idle for one in seen} == {0}


# convergence


def sawtooth():
    return [look("ready", 100 - n, 100) for _ in range(8) for n in (90, 50, 10)]


@pytest.mark.usefixtures("fast")
async def test_a_guest_that_outruns_the_job_is_told_of(tmp_path):
    async with following(tmp_path, sawtooth(), kind="commit") as (job, _, _):
        job.complete()
        with pytest.raises(StalledError, match="does not converge") as caught:
            await whole(job, converging=0.0)
    assert "--throttle-guest" in caught.value.remedy
    assert job.progress.lagging >= 3


@pytest.mark.usefixtures("fast")
async def test_nobody_minds_while_no_pivot_was_asked_for(tmp_path):
    looks = [*sawtooth(), look("concluded", 100)]
    async with following(tmp_path, looks, kind="commit") as (job, _, _):
        seen = await whole(job, converging=0.0)
    assert seen[-1].status == "concluded"
    assert {one.phase for one in seen[:-1]} == {"ready"}


# its end


@pytest.mark.usefixtures("fast")
async def test_a_job_that_vanishes_has_no_verdict(tmp_path):
    async with following(tmp_path, [look("running", 10), None]) as (job, _, _):
        with pytest.raises(JobError, match="somebody else dismissed it"):
            await whole(job)


@pytest.mark.parametrize(
    ("event", "error"),
    [
        (None, None),
        (("BLOCK_JOB_COMPLETED", {}), None),
        (("BLOCK_JOB_COMPLETED", {"error": "Input/output error"}), "Input/output error"),
        (("BLOCK_JOB_CANCELLED", {}), "Operation canceled"),
    ],
)
@pytest.mark.usefixtures("fast")
async def test_where_a_stream_dismisses_itself_its_last_event_is_its_verdict(
    tmp_path, event, error
):
    """QEMU 7.2 does not survive a concluded stream job."""
    looks = [look("running", 10), look("pending", 100), None]
    async with following(tmp_path, looks, version=OLD) as (job, _, fake):
        if event is not None:
            fake.event(event[0], device=NAME, type="stream", **event[1])
        seen = await whole(job)
    assert seen[-1].status == "concluded"
    assert seen[-1].phase == "ended"
    assert seen[-1].error == error
    assert seen[-1].done == 100  # as it was seen last


@pytest.mark.usefixtures("fast")
async def test_a_commit_never_dismisses_itself(tmp_path):
    async with following(tmp_path, [None], version=OLD, kind="commit") as (job, _, _):
        with pytest.raises(JobError):
            await whole(job)


@pytest.mark.usefixtures("fast")
async def test_gone_before_it_was_ever_seen(tmp_path):
    async with following(tmp_path, [None], version=OLD) as (job, _, fake):
        fake.event("BLOCK_JOB_COMPLETED", device=NAME, type="stream", error="early")
        (seen,) = await whole(job)
    assert (seen.status, seen.error) == ("concluded", "early")


@pytest.mark.parametrize(
    ("version", "kind", "itself"),
    [(OLD, "stream", True), (OLD, "commit", False), (NEW, "stream", False), (NEW, "commit", False)],
)
async def test_how_it_is_started(tmp_path, version, kind, itself):
    """It does nothing final by itself, and its verdict stays to be read."""
    async with following(tmp_path, [None], version=version, kind=kind) as (job, _, fake):
        await job.start("block-stream", {"device": "d0"})
        sent = fake.seen[-1]
    assert sent["execute"] == "block-stream"
    assert sent["arguments"] == {
        "job-id": NAME,
        "device": "d0",
        "auto-finalize": False,
        "auto-dismiss": itself,
    }


@pytest.mark.parametrize(
    "nonsense",
    [
        {"current-progress": "x"},
        {"total-progress": None},
        {"current-progress": -5},
        {"current-progress": 1.5, "total-progress": []},
    ],
)
@pytest.mark.usefixtures("fast")
async def test_nonsense_counts_are_none(tmp_path, nonsense):
    told, block = look("running", 0, 0)
    looks = [(told | nonsense, block | {"speed": "fast"}), look("concluded")]
    async with following(tmp_path, looks) as (job, _, _):
        first, _ = await whole(job)
    assert (first.done, first.total, first.remaining) == (0, 0, 0)


@pytest.mark.usefixtures("fast")
async def test_a_status_of_a_newer_qemu_is_shown_and_waited_for(tmp_path):
    async with following(tmp_path, [look("pondering"), look("concluded")]) as (job, _, _):
        seen = await whole(job)
    assert [one.status for one in seen] == ["pondering", "concluded"]


# iteration


@pytest.mark.usefixtures("fast")
async def test_iterating_sees_the_end_and_stops(tmp_path):
    looks = [look("running", n) for n in range(5)] + [look("concluded", 100)]
    async with following(tmp_path, looks) as (job, _, _):

        async def drive():
            await whole(job)
            job.end()

        driver = asyncio.create_task(drive())
        seen = [one async for one in job]
        await driver
    assert seen[-1].status == "concluded"
    assert [one.done for one in seen] == sorted(one.done for one in seen)


async def test_iterating_over_a_job_that_is_over_ends(tmp_path):
    async with following(tmp_path, [None]) as (job, _, _):
        job.end()
        assert [one async for one in job] == []
        job.end()  # idempotent


@pytest.mark.usefixtures("fast")
async def test_a_consumer_that_is_slow_misses_looks_and_not_the_end(tmp_path):
    looks = [look("running", n) for n in range(30)] + [look("concluded", 100)]
    async with following(tmp_path, looks) as (job, _, _):
        driver = asyncio.create_task(whole(job))
        seen = []
        async for one in job:
            seen.append(one)
            if one.status == "concluded":
                break
            await asyncio.sleep(0.02)
        assert len(await driver) == 31
    assert seen[-1].status == "concluded"


# verbs


@pytest.mark.parametrize("status", ["created", "running", "paused", "ready", "waiting", "pending"])
async def test_cancel_in_time(tmp_path, status):
    async with following(tmp_path, [look(status)]) as (job, script, _):
        await job.cancel()
    assert script.verbs == ["job-cancel"]


@pytest.mark.parametrize("found", [None, look("aborting"), look("concluded")])
async def test_cancel_too_late_is_nothing(tmp_path, found):
    async with following(tmp_path, [found]) as (job, script, _):
        await job.cancel()
    assert script.verbs == []


@pytest.mark.parametrize("after", [None, look("aborting"), look("concluded")])
async def test_cancel_just_too_late_is_nothing(tmp_path, after):
    """It ended between the look and the command."""
    async with following(tmp_path, [look("running"), after]) as (job, script, _):
        script.refuse["job-cancel"] = "Job in state 'concluded' cannot accept command verb 'cancel'"
        await job.cancel()
    assert script.verbs == ["job-cancel"]


async def test_cancel_that_is_refused_is_a_failure(tmp_path):
    async with following(tmp_path, [look("running")]) as (job, script, _):
        script.refuse["job-cancel"] = "no"
        with pytest.raises(CommandError, match="no"):
            await job.cancel()


async def test_dismiss(tmp_path):
    async with following(tmp_path, [None], kind="backup") as (job, script, fake):
        await job.dismiss()
        assert script.verbs == ["job-dismiss"]
        script.refuse["job-dismiss"] = "Job not found"
        await job.dismiss()  # idempotent
        assert [one["execute"] for one in fake.seen][-2:] == ["job-dismiss", "query-jobs"]


async def test_nobody_dismisses_what_does_so_itself(tmp_path):
    async with following(tmp_path, [None], version=OLD) as (job, script, _):
        await job.dismiss()
    assert script.verbs == []


@pytest.mark.parametrize(("after", "fails"), [(None, False), (look("running"), True)])
async def test_dismiss_that_is_refused(tmp_path, after, fails):
    """Somebody else was faster; or it was not concluded."""
    async with following(tmp_path, [after]) as (job, script, _):
        script.refuse["job-dismiss"] = "Job not found"
        with pytest.raises(CommandError) if fails else contextlib.nullcontext():
            await job.dismiss()


@pytest.mark.parametrize(
    ("last", "error"),
    [(None, None), (look("concluded"), None), (look("concluded", error="No space"), "No space")],
)
@pytest.mark.usefixtures("fast")
async def test_waiting_for_the_end(tmp_path, last, error):
    async with following(tmp_path, [look("waiting"), look("aborting"), last]) as (job, _, _):
        assert await job.wait_concluded() == error


@pytest.mark.usefixtures("fast")
async def test_waiting_for_an_end_that_does_not_come(tmp_path):
    async with following(tmp_path, [look("aborting")], stall=0.5) as (job, _, _):
        with pytest.raises(StalledError, match="stays aborting") as caught:
            await job.wait_concluded()
    assert caught.value.standing == "it is still there"


@pytest.mark.usefixtures("fast")
async def test_waiting_for_one_that_moves_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr("qmpblock.qemu.job._MOST_MOVES", 20)
    looks = [look("aborting", n) for n in range(100)]
    async with following(tmp_path, looks) as (job, _, _):
        with pytest.raises(StalledError, match="it has said 21 times"):
            await job.wait_concluded()


async def test_verbs_are_qemus(tmp_path):
    async with following(tmp_path, [look("running")]) as (job, script, fake):
        await job.pause()
        await job.resume()
        await job.set_speed(1000)
        await job.complete_now()
        await job.finalize()
    assert script.verbs == [
        "job-pause",
        "job-resume",
        "block-job-set-speed",
        "job-complete",
        "job-finalize",
    ]
    assert [m["arguments"] for m in fake.seen if "speed" in m.get("arguments", {})] == [
        {"device": NAME, "speed": 1000}
    ]


@pytest.mark.parametrize(
    ("status", "ready"), [("ready", True), ("standby", True), ("running", False), ("paused", False)]
)
def test_progress(status, ready):
    seen = Progress(status, "", 60, 50, idle=4.9)
    assert seen.ready is ready
    assert seen.remaining == 0  # never below: the two are read at different moments
    assert not seen.stalled
    assert Progress(status, "", 0, 0, idle=5.0).stalled


@pytest.mark.parametrize("left", ["pending", "waiting", "concluded", "ready", None])
async def test_a_job_that_somebody_else_has_asked_to_complete(tmp_path, left):
    """Who died asked; it was ready when we looked, and is not when we ask."""
    looks = [None if left is None else look(left, 100)]
    async with following(tmp_path, looks, kind="commit") as (job, script, _):
        script.refuse["job-complete"] = f"Job in state '{left}' cannot accept command verb"
        if left in ("ready", None):
            with pytest.raises(CommandError, match="cannot accept"):
                await job.complete_now()
        else:
            await job.complete_now()
    assert script.verbs == ["job-complete"]


def test_no_job_that_may_break_a_flush_says_itself_what_an_error_does():
    """So `on_error` decides for each (K34). What is exempt is never what a device lies on."""
    exempt = {"backups.py", "filling.py"}
    own = re.compile(r'"on-(?:source-|target-)?error": "(?:report|enospc)"')
    package = Path(qmpblock.__file__).parent
    say = {path.name for path in package.rglob("*.py") if own.search(path.read_text("utf-8"))}
    assert say == exempt
