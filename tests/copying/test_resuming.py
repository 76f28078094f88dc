"""Going on from what a copy left: what is refused, what is drawn, and what a failure says."""

import pytest

from qmpblock.address import UnixAddress
from qmpblock.copying.job import CopyJob
from qmpblock.copying.plan import CopyPlan
from qmpblock.copying.resuming import give_up, say_kept
from qmpblock.copying.target import NBDTarget
from qmpblock.copying.wiretarget import WireTarget
from qmpblock.errors import Error


class Target:
    """What is left of a target, and whether it was asked to go."""

    def __init__(self, left):
        self.left = left
        self.removed = False

    async def remove(self):
        self.removed = True
        return self.left


async def test_a_failure_says_what_is_kept():
    job, targets = CopyJob(), [Target("/i/a.partial"), Target(None)]
    error = Error("it broke", standing="there is no copy")
    await give_up(targets, job)
    say_kept(error, job)
    assert all(one.removed for one in targets)
    assert job.kept == ("/i/a.partial",)
    assert error.standing.startswith("there is no copy; what was copied is kept in /i/a.partial")


async def test_a_failure_with_nothing_kept_says_no_more_than_it_did():
    job, error = CopyJob(), Error("it broke", standing="there is no copy")
    await give_up([Target(None)], job)
    say_kept(error, job)
    assert (job.kept, error.standing) == ((), "there is no copy")


@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
async def test_an_image_with_a_server_is_not_said_to_be_kept(fmt):
    """For it would be refused, as nothing there tells whose it is."""
    server = NBDTarget(UnixAddress("/s"), "x")
    target = WireTarget(
        CopyPlan(None, "nbd://h/x", fmt, server=server), "qmpblock-0123abcd-to-0", 0
    )
    target.keeps = True
    assert await target.remove() == ("nbd://h/x" if fmt == "raw" else None)
