"""What guards say, and where none is needed. Guards in QEMU: live/test_polling.py."""

import json

import pytest
from drawing import Drawing
from fake_objects import fake_vm

from qmpblock import polling
from qmpblock.errors import RecordError
from qmpblock.lock import Holder


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
