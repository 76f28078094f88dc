"""What is shown of several jobs that do one thing, and who waits for their end."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpblock.copying.job import CopyJob, is_worth, joined
from qmpblock.copying.latency import Pacer
from qmpblock.qemu.job import Job, Progress


def seen(status="running", phase="copying", done=1, total=4, **more):
    return Progress(status=status, phase=phase, done=done, total=total, **more)


def test_several_are_as_far_as_the_last_of_them():
    ready = seen("ready", "ready", 4, 4, rate=1.0)
    both = joined((ready, seen(rate=2.0, eta=1.5)))
    assert (both.status, both.phase, both.done, both.total) == ("running", "copying", 5, 8)
    assert (both.rate, both.eta) == (3.0, 1.5)
    assert not both.ready
    assert joined((ready, ready)).ready


def test_one_that_waits_for_room_is_said():
    assert joined((seen(), seen("paused", "waiting for room"))).phase == "waiting for room"


def test_one_that_has_ended_does_not_hide_the_others():
    over = seen("concluded", "ended", 4, 4, error="it broke")
    both = joined((over, seen("pending", "finishing", 4, 4)))
    assert (both.status, both.error) == ("pending", "it broke")
    assert joined((over, over)).status == "concluded"


@given(
    st.lists(
        st.builds(
            seen,
            st.sampled_from(["created", "running", "paused", "ready", "pending", "concluded"]),
            st.just("x"),
            st.integers(0, 9),
            st.integers(0, 9),
        ),
        min_size=1,
    )
)
def test_nothing_is_left_out_of_the_sums(every):
    whole = joined(tuple(every))
    assert whole.done == sum(one.done for one in every)
    assert whole.total == sum(one.total for one in every)
    far = ("ready", "pending", "concluded")
    assert not whole.ready or all(one.status in far for one in every)


async def test_iterating_ends_with_the_copy():
    job = CopyJob()
    shown = []

    async def show():
        async for one in job:
            shown.append(one.status)

    showing = asyncio.create_task(show())
    await asyncio.sleep(0)
    job.publish("vd0", seen())
    await asyncio.sleep(0.01)
    job.publish("vd1", seen("created"))
    await asyncio.sleep(0.01)
    job.end()
    await showing
    assert shown == ["running", "created"]
    assert set(job.disks) == {"vd0", "vd1"}


@pytest.mark.parametrize("how", ["finished", "end"])
async def test_who_waits_for_the_end_is_woken_by_it_and_by_a_failure(how):
    job = CopyJob()
    waiting = asyncio.create_task(job.complete())
    await asyncio.sleep(0.01)
    assert job.completion.is_set()
    assert not waiting.done()
    getattr(job, how)()
    await asyncio.wait_for(waiting, 60)


def test_a_speed_is_shared():
    job = CopyJob()
    job.speed = 10
    assert job.share() == 10
    job.runs((object.__new__(Job),) * 3)
    assert job.share() == 4


async def test_what_is_compared_keeps_to_the_speed(monkeypatch):
    """Whoever compares asks for several turns at once."""
    job, clock = CopyJob(), asyncio.get_running_loop().time
    with monkeypatch.context() as patch:
        patch.setattr("qmpblock.copying.job.asyncio.sleep", None)  # there is nothing to wait for
        await asyncio.gather(*(job.turn(1 << 30) for _ in range(8)))
    job.speed = 100
    began = clock()
    await asyncio.gather(*(job.turn(10) for _ in range(4)))  # the first need not wait
    assert clock() - began >= 0.3
    job.speed = 1 << 40
    await asyncio.gather(*(job.turn(1 << 20) for _ in range(4)))


async def test_what_is_compared_keeps_to_what_the_guest_bears():
    job, clock = CopyJob(pacer=Pacer(0.02, 1 << 20)), asyncio.get_running_loop().time
    began = clock()
    for _ in range(3):
        await job.turn(1 << 17)
    assert clock() - began >= 0.25


def test_what_is_worth_to_be_gone_on_from():
    assert is_worth(seen(done=1))
    assert not is_worth(seen(done=0))
    assert not is_worth(seen("paused", "waiting for room"))  # it would keep the room


def test_what_is_kept_is_said():
    job = CopyJob()
    assert job.kept_words == ""
    job.kept = ("/i/a.partial", "/i/b\x1b.partial")
    assert "/i/a.partial, /i/b" in job.kept_words
    assert "--resume" in job.kept_words
    assert "\x1b" not in job.kept_words
