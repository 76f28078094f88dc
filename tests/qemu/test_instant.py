"""A VM that is paused for an instant, by QEMU's answers. With QEMUs: live/test_points.py."""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
from drawing import chain
from fake_objects import fake_vm

from qmpblock.qemu.instant import instant, resume

NODE = "qmpblock-deadbeef-paused"


def state(status):
    return {"return": {"status": status, "running": status == "running"}}


async def sent(tmp_path, act, status="running", **answers):
    """Return which commands change anything, in their order."""
    async with fake_vm(tmp_path / "q", chain("d0"), **answers) as (vm, qemu):
        qemu["query-status"] = state(status)
        plain = qemu.get

        def get(command, default=None):
            if command in ("stop", "cont"):
                qemu["query-status"] = state("paused" if command == "stop" else "running")
            return plain(command, default)

        qemu.get = get
        before = len(qemu.fake.seen)
        try:
            await act(vm)
        finally:
            told = [one["execute"] for one in qemu.fake.seen[before:]]
        return [one for one in told if one != "query-status"]


async def in_it(vm):
    async with instant(vm, NODE):
        await vm.monitor.execute("qom-list", {"path": "/"})


async def test_it_is_marked_from_before_the_pause_until_after_it(tmp_path):
    expected = ["blockdev-add", "stop", "qom-list", "cont", "blockdev-del"]
    assert await sent(tmp_path, in_it) == expected


async def test_the_mark_of_one_who_died_before_the_pause_is_taken_over(tmp_path):
    error = {"error": {"class": "GenericError", "desc": f"Duplicate nodes with node-name='{NODE}'"}}

    expected = ["blockdev-add", "stop", "qom-list", "cont", "blockdev-del"]
    assert await sent(tmp_path, in_it, **{"blockdev-add": error}) == expected


async def test_a_vm_that_is_paused_stays_so(tmp_path):
    assert await sent(tmp_path, in_it, "paused") == ["qom-list"]


async def test_where_the_body_fails_it_is_for_whoever_undoes_it(tmp_path):
    async def failing(vm):
        with pytest.raises(ZeroDivisionError):
            async with instant(vm, NODE):
                raise ZeroDivisionError
        await vm.monitor.execute("query-version")

    assert await sent(tmp_path, failing) == ["blockdev-add", "stop", "query-version"]


@pytest.mark.parametrize(
    ("status", "goes_on"), [("paused", True), ("running", False), ("io-error", False)]
)
async def test_only_what_is_paused_goes_on(tmp_path, status, goes_on):
    done = await sent(tmp_path, lambda vm: resume(vm, NODE), status)
    assert done == ["cont"] * goes_on + ["blockdev-del"]


class Lent:
    """A monitor that a manager lends: what it is told, and what the manager is asked.

    :ivar meanwhile: what somebody else does to the VM as it is marked.
    """

    is_lent = True

    def __init__(self, *meanwhile):
        self.told = []
        self.status = "running"
        self.monitor = self
        self.meanwhile = meanwhile
        self.stops = []

    async def execute(self, command, arguments=None):
        self.told.append(command)
        if command == "blockdev-add":
            for status in self.meanwhile:
                self.status = status
                self.stops += ["STOP"] * (status == "paused")
        return {"status": self.status, "running": self.status == "running"}

    @contextmanager
    def subscribe(self, name):
        assert name == "STOP"
        yield SimpleNamespace(pending=lambda: list(self.stops))

    def in_one_turn(self):
        return nullcontext()

    async def through(self, ask):
        await ask(self)

    async def suspend(self):
        self.told.append("suspend")
        self.status = "paused"

    async def resume(self):
        self.told.append("resume")
        self.status = "running"


async def test_a_manager_that_lends_its_monitor_pauses_the_vm_itself():
    """It lets its locks on the images go at a `stop`, and takes them again in its own `resume`."""
    vm = Lent()
    await in_it(vm)
    changing = [one for one in vm.told if one != "query-status"]
    assert changing == ["blockdev-add", "suspend", "qom-list", "resume", "blockdev-del"]


async def test_what_somebody_pauses_as_it_is_marked_stays_paused():
    vm = Lent("paused")
    await in_it(vm)
    assert vm.told[-3:] == ["query-status", "blockdev-del", "qom-list"]
    assert vm.status == "paused"
    vm = Lent("paused", "running")
    await in_it(vm)
    assert [one for one in vm.told if one in ("suspend", "resume")] == ["suspend", "resume"]
