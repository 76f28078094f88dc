"""Watching many disks, without a VM: who goes on when one fails, and what is told."""

import asyncio
from contextlib import asynccontextmanager
from types import SimpleNamespace

import pytest

from qmpblock.allocation.room import RoomResult
from qmpblock.errors import BusyError, ConnectError, Error, RequestError
from qmpblock.policy import watch as policywatch
from qmpblock.policy.file import DiskPolicy, Policy
from qmpblock.policy.watch import Watch
from qmpblock.sizes import Amount


def policy(*names, ahead=100):
    """Return a policy; a name is of a VM and its disk: `a1`."""
    amount = Amount(ahead) if ahead else None
    return Policy("p.yaml", tuple(DiskPolicy(f"/{one[0]}", one, ahead=amount) for one in names))


class VMs:
    """VMs that can be reached until the test says that they have ended."""

    def __init__(self, monkeypatch):
        self.connections = []
        self.disks = {}
        self.cancelled = []
        monkeypatch.setattr(policywatch, "keep_ahead", self._keep)

    @asynccontextmanager
    async def connect(self, address):
        self.connections.append(address)
        if address == "/x":
            raise ConnectError("nothing listens")

        async def disk(name):
            return SimpleNamespace(name=f"disk {name}", size=1000)

        yield SimpleNamespace(disk=disk)

    async def _keep(self, disk, size, *, keep_free, tell):
        assert size == 100
        end = asyncio.get_running_loop().create_future()
        self.disks[disk.name.removeprefix("disk ")] = SimpleNamespace(end=end, tell=tell)
        try:
            await end
        except asyncio.CancelledError:
            self.cancelled.append(disk.name)
            raise


def room(reserved, error=None):
    return RoomResult("d", "/image", 100, 0, reserved, reserved, error=error)


async def settled():
    for _ in range(5):
        await asyncio.sleep(0)


def test_without_any_room_wanted_there_is_nothing_to_watch():
    with pytest.raises(RequestError, match="no disk has `ahead`") as caught:
        Watch(policy("a1", "b1", ahead=None))
    assert caught.value.standing == "nothing was touched"


async def test_one_failure_does_not_end_the_others(monkeypatch):
    vms, ended = VMs(monkeypatch), []
    watch = Watch(
        policy("a1", "a2", "b1", "x1"),
        connect=vms.connect,
        ended=lambda one: ended.append((one.name, one.error)),
    )
    task = asyncio.ensure_future(watch.run())
    await settled()
    assert sorted(vms.connections) == ["/a", "/b", "/x"]  # one connection a VM
    assert [name for name, _ in ended] == ["x1"]
    busy = BusyError("another one")
    vms.disks["a1"].end.set_exception(busy)
    await settled()
    assert ended[1:] == [("disk a1", busy)]
    assert not task.done()
    for name in ("a2", "b1"):
        vms.disks[name].end.set_result(None)
    await task
    assert ended[2:] == [("disk a2", None), ("disk b1", None)]
    errors = [one.error for one in watch.disks.values()]
    assert errors[0] is busy
    assert errors[1:3] == [None, None]
    assert isinstance(errors[3], ConnectError)


async def test_one_connection_however_the_address_is_written(monkeypatch):
    vms = VMs(monkeypatch)
    disks = [DiskPolicy(address, "d", ahead=Amount(100)) for address in ("/a", "unix:/a", "/b")]
    watch = Watch(Policy("p.yaml", tuple(disks)), connect=vms.connect)
    task = asyncio.ensure_future(watch.run())
    await settled()
    assert vms.connections == ["/a", "/b"]
    task.cancel()
    await asyncio.wait({task})


async def test_what_is_told_adds_up(monkeypatch):
    vms, told = VMs(monkeypatch), []
    watch = Watch(policy("a1"), connect=vms.connect, tell=told.append)
    task = asyncio.ensure_future(watch.run())
    await settled()
    full = Error("no space")
    for one in (room(60), room(0, full), room(40)):
        vms.disks["a1"].tell(one)
    assert [(one.top_ups, one.reserved, one.error) for one in told] == [
        (1, 60, None),
        (1, 60, full),
        (2, 100, None),
    ]
    vms.disks["a1"].tell(room(0, full))
    vms.disks["a1"].end.set_result(None)
    await task
    [last] = watch.disks.values()
    assert last.error is full  # so it was when the VM ended


async def test_cancelled_every_watch_ends(monkeypatch):
    vms, ended = VMs(monkeypatch), []
    watch = Watch(policy("a1", "a2", "b1"), connect=vms.connect, ended=ended.append)
    task = asyncio.ensure_future(watch.run())
    await settled()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert sorted(vms.cancelled) == ["disk a1", "disk a2", "disk b1"]
    assert ended == []
