"""What guards say, and where none is needed. Guards in QEMU: live/test_polling.py."""

import asyncio
import json

import pytest
from drawing import Drawing
from fake_objects import dead, fake_vm

from qmpblock.errors import RecordError
from qmpblock.names import POLLING_LOCK
from qmpblock.qemu import polling
from qmpblock.qemu.lock import Holder


def test_a_guard_reads_back():
    said = json.loads(json.dumps({"poll_max_ns": [["io0", 32768], ["io1", 0]], "new": 1}))
    guard = Holder.me("run", **said).says(polling.Guard)
    assert guard.poll_max_ns == (("io0", 32768), ("io1", 0))
    assert guard.more == {"new": 1}


@pytest.mark.parametrize("said", [{}, {"poll_max_ns": {"io0": 1}}, {"poll_max_ns": [["io0", "1"]]}])
def test_what_a_guard_may_not_say(said):
    with pytest.raises(RecordError, match="qmpblock-poll-run"):
        Holder.me("run", **said).says(polling.Guard, "qmpblock-poll-run")


async def test_a_qemu_without_the_defect_is_asked_nothing(tmp_path):
    async with fake_vm(tmp_path / "q", Drawing()) as (vm, objects):
        before = len(objects.fake.seen)
        async with polling.unpolled(vm.monitor, wake=True):
            pass
        assert len(objects.fake.seen) == before


class _Lies(list):
    """The lock of polling, each time held by another dead one from when it is let go on."""

    on = False

    def holder(self):
        self.append(dead(f"run{len(self)}").text())
        return self[-1]


async def test_a_cancel_ends_also_where_another_dead_one_has_the_lock_each_time(tmp_path):
    """A command slept on past SIGTERM: what puts polling back is not disturbed by it."""
    lies = _Lies()
    async with fake_vm(tmp_path / "q", Drawing()) as (vm, objects):
        vm.monitor._transport.version = (7, 2, 0)
        threads = [{"id": "io0", "thread-id": 1 << 30, "poll-max-ns": 32768}]
        objects["query-iothreads"] = {"return": threads}
        real = objects.get

        def get(command, default=None):
            arguments = objects.fake.seen[-1].get("arguments", {})
            if lies.on and command == "object-add" and arguments["id"] == POLLING_LOCK:
                return {"error": {"class": "GenericError", "desc": "duplicate"}}
            if lies.on and command == "qom-get" and arguments["path"].endswith(POLLING_LOCK):
                return {"return": lies.holder()}
            return real(command, default)

        objects.get = get
        inside = asyncio.Event()

        async def work():
            async with polling.unpolled(vm.monitor):
                inside.set()
                await asyncio.sleep(3600)

        working = asyncio.create_task(work())
        await inside.wait()
        lies.on = True
        working.cancel()
        done, _ = await asyncio.wait({working}, timeout=120)
        assert done
        assert working.cancelled()
        assert 1 < len(lies) < 200
