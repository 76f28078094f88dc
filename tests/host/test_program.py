"""One of QEMU's programs: for how long it is waited for."""

import asyncio

import pytest

from qmpblock.errors import StalledError
from qmpblock.host.qemuimg import QemuImg


@pytest.fixture
def standin(tmp_path):
    """Return what makes a script that stands in for qemu-img, and one run of it on an image."""
    script, image = tmp_path / "qemu-img", tmp_path / "image"
    image.write_bytes(bytes(4096))

    def run(words, stall):
        script.write_text(f"#!/bin/sh\n{words}\n")
        script.chmod(0o755)
        return QemuImg(str(script), stall=stall).rebase(str(image), "raw", "", "", known=None)

    return run


async def test_it_may_be_silent_while_it_works(standin, tmp_path):
    """A large image takes minutes without a word; so does a key of LUKS on a busy machine."""
    enough = tmp_path / "enough"
    # The process itself uses the processor: what it starts would not count.
    working = asyncio.ensure_future(standin(f"while [ ! -e {enough} ]; do :; done", 2))
    await asyncio.sleep(5)
    assert not working.done(), await working
    enough.touch()
    await working


async def test_it_may_not_while_it_does_nothing(standin):
    with pytest.raises(StalledError, match="did nothing for"):
        await standin("exec sleep 6000", 0.5)


async def test_it_may_not_once_it_has_stopped_to_work(standin):
    busy = "n=0; while [ $n -lt 20000 ]; do n=$((n+1)); done"
    with pytest.raises(StalledError):
        await standin(f"{busy}; exec sleep 6000", 0.5)
