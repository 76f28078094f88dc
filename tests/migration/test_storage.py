"""How mirrors end while the guest stands, by QEMU's word alone where it has said all."""

from types import SimpleNamespace

import pytest
from drawing import RUN, chain
from fake_objects import fake_vm

from qmpblock.errors import JobError
from qmpblock.migration.course import Course
from qmpblock.migration.storage import Storage
from qmpblock.qemu.job import Progress

ENDS = {"type": "mirror", "len": 8, "offset": 8, "speed": 0}


async def ended(tmp_path, **said):
    """End one mirror, of whose end QEMU says so much; return what was copied, what was asked."""
    async with fake_vm(tmp_path / "q", chain("d0")) as (vm, qemu):
        pair = SimpleNamespace(full=False)
        storage = Storage(vm, RUN, [pair], 0, print, Course(0.0), None)
        [job] = storage.jobs
        storage._note(job, Progress("ready", "", 4, 8))
        answered = qemu.get

        def get(command, default=None):
            if command == "block-job-cancel":
                if said:
                    qemu.fake.event("BLOCK_JOB_COMPLETED", device=job, **said)
                qemu.fake.event("JOB_STATUS_CHANGE", id=job, status="concluded")
                return {"return": {}}
            if command == "query-block-jobs":
                return {"return": [{"device": job, "status": "concluded", **ENDS}]}
            return answered(command, default)

        qemu.get = get
        await storage.end()
        return storage.copied, [one["execute"] for one in qemu.fake.seen]


async def test_nothing_is_asked_of_mirrors_that_say_how_they_ended(tmp_path):
    copied, asked = await ended(tmp_path, **ENDS)
    assert copied == (8,)
    assert asked[-1] == "block-job-cancel"


async def test_of_one_that_does_not_say_it_is_asked(tmp_path):
    copied, asked = await ended(tmp_path)
    assert copied == (8,)
    assert asked[-1] == "query-block-jobs"


async def test_one_that_says_that_it_failed_is_none(tmp_path):
    with pytest.raises(JobError, match="No space left"):
        await ended(tmp_path, **ENDS, error="No space left on device")
