"""How many looks those take that follow jobs of one VM. With a QEMU: live/test_migrate.py."""

import asyncio

import pytest

from qmpblock.qemu.looks import Looks


class Counting:
    """A monitor that says how often it was asked, as a job's progress, when it is let."""

    def __init__(self):
        self.asked = 0
        self.let = asyncio.Semaphore(0)

    async def read(self, *commands):
        assert commands == ("query-jobs", "query-block-jobs")
        self.asked += 1
        number = self.asked
        await self.let.acquire()
        jobs = [{"id": name, "status": "ready", "number": number} for name in "abc"]
        return [[*jobs, {"id": "no-block", "status": "running"}], [{"device": "a", "speed": 5}]]


async def asking(looks, *names):
    """Have all of them ask, and return once they have begun to."""
    asked = [asyncio.ensure_future(looks.closely(name)) for name in names]
    await asyncio.sleep(0.01)
    return asked


async def test_who_asks_during_a_look_shares_the_next_one_with_all_who_do():
    monitor = Counting()
    looks = Looks(monitor)
    (first,) = await asking(looks, "a")
    rest = await asking(looks, "a", "b", "c", "gone")
    assert monitor.asked == 1  # and what that one saw may be older than what these ask for
    monitor.let.release()
    monitor.let.release()
    assert (await first)["number"] == 1
    a, b, c, gone = await asyncio.gather(*rest)
    assert {one["number"] for one in (a, b, c)} == {2}
    assert gone is None
    assert monitor.asked == 2


async def test_both_records_of_a_job_are_one():
    monitor = Counting()
    monitor.let.release()
    looks = Looks(monitor)
    seen = await looks.closely("a")
    assert (seen["status"], seen["speed"]) == ("ready", 5)
    monitor.let.release()
    assert (await looks.closely("no-block"))["status"] == "running"


@pytest.mark.parametrize(("cancelled", "seen"), [(0, [2, 2]), (1, [1, 2])])
async def test_one_that_gives_up_keeps_no_other_from_its_look(cancelled, seen):
    monitor = Counting()
    asked = await asking(Looks(monitor), "a", "b", "c")
    asked.pop(cancelled).cancel()
    for _ in range(3):
        monitor.let.release()
    assert [one["number"] for one in await asyncio.gather(*asked)] == seen


async def test_while_they_rest_nobody_looks():
    monitor, stands = Counting(), True
    looks = Looks(monitor)
    looks.rest_while(lambda: stands)
    monitor.let.release()
    (asked,) = await asking(looks, "a")
    assert monitor.asked == 0
    stands = False
    assert (await asked)["number"] == 1
