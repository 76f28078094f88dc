"""An overlay of ours comes to lie on its image again, whoever opened it."""

import json
import logging

import pytest
from drawing import RUN, Drawing
from fake_objects import fake_vm

from qmpblock.changes.nodes import relink

OURS, THEIRS = f"qmpblock-{RUN}-0-overlay", "libvirt-3-format"
TOLD = "json:" + json.dumps(
    {"driver": "qcow2", "encrypt": {"format": "luks", "key-secret": "key0"}, "file": "f"}
)


async def sent(tmp_path, node, filename, *, encrypted=True):
    """Return what QEMU is asked for so that an overlay lies on its image."""
    drawn = Drawing().image("d0").image("between", backing="d0")
    drawn.image(node, backing="between", filename=filename, encrypted=encrypted)
    answers = {one: {"return": ""} for one in ("blockdev-reopen", "human-monitor-command")}
    async with fake_vm(tmp_path / "q", drawn, **answers) as (vm, qemu):
        await relink(vm, node, "d0", await vm.graph())
        return [
            (one["execute"], one["arguments"])
            for one in qemu.fake.seen
            if one["execute"] in answers
        ]


@pytest.mark.parametrize("filename", ["/i/top", TOLD])
async def test_one_that_its_manager_opened_needs_no_key(tmp_path, filename):
    """Only what it lies on changes: QEMU need not tell how it was opened."""
    [(command, words)] = await sent(tmp_path, THEIRS, filename)
    assert command == "human-monitor-command"
    assert "backing=d0" in words["command-line"]


async def test_one_of_ours_is_described_whole(tmp_path):
    [(command, words)] = await sent(tmp_path, OURS, TOLD)
    assert command == "blockdev-reopen"
    [options] = words["options"]
    assert options["encrypt"] == {"format": "luks", "key-secret": "key0"}
    assert (options["node-name"], options["backing"]) == (OURS, "d0")


async def test_one_of_ours_of_which_nothing_tells_the_key_stays(tmp_path, caplog):
    """It comes home with what is between, if there is room."""
    caplog.set_level(logging.WARNING)
    assert await sent(tmp_path, OURS, "/i/top") == []
    assert "stays where it is" in caplog.text
