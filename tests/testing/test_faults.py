"""Faults that need no QEMU; the others are shown in tests/live."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest

from qmpblock.errors import RequestError, StalledError, ToolError, UnsupportedError
from qmpblock.testing.faults import Controller, fill_up, inject, slow, small_file_system
from qmpblock.testing.images import BuiltDisk, BuiltImage
from qmpblock.testing.scenario import parse_scenario


def chain(attach: str = "{}") -> BuiltDisk:
    text = f"about: Test.\nimages: [{{size: 1M}}, {{}}, {{}}]\nattach: {attach}"
    (disk,) = parse_scenario(text, "test").disks
    built = None
    for image in disk.images:
        built = BuiltImage(image, Path("/d") / image.file, built)
    assert built is not None
    return BuiltDisk(disk, built)


def test_faults_add_up_on_their_layer_and_nowhere_else() -> None:
    disk = inject(chain(), "read_aio", "EIO", layer=1, offset=4096, iotype="read")
    disk = inject(disk, "flush_to_disk", "ENOSPC", layer=1, once=True)
    active, middle, base = disk.active.chain()
    assert [dict(rule) for rule in middle.faults] == [
        {"event": "read_aio", "errno": 5, "once": False, "sector": 8, "iotype": "read"},
        {"event": "flush_to_disk", "errno": 28, "once": True},
    ]
    assert active.faults == base.faults == ()
    assert disk.active.describe(node="d0")["backing"]["file"]["driver"] == "file"
    live = disk.active.describe(node="d0", live=True)
    assert live["backing"]["file"]["driver"] == "blkdebug"
    assert live["backing"]["file"]["image"]["node-name"] == "d0-1-file"


def test_a_slow_file_has_a_group_of_its_own() -> None:
    disk = slow(chain(), 1 << 20)
    file = disk.active.describe(node="d0", live=True)["file"]
    assert (file["driver"], file["throttle-group"]) == ("throttle", disk.active.slow_group())


@pytest.mark.parametrize("attach", ["{style: drive}", "{node_names: no}"])
def test_faults_need_named_nodes(attach: str) -> None:
    with pytest.raises(RequestError, match="nodes have names"):
        inject(chain(attach), "none", "EIO")


def test_a_layer_that_is_not_there() -> None:
    with pytest.raises(RequestError, match="layers 0 to 2, not 3"):
        slow(chain(), 1, layer=3)


async def test_a_small_file_system_fills_up(tmp_path: Path) -> None:
    try:
        async with small_file_system(tmp_path / "small", 1 << 20) as directory:
            filler = fill_up(directory, leave=64 << 10)
            with pytest.raises(OSError, match="No space left"):
                (directory / "more").write_bytes(bytes(128 << 10))
            filler.unlink()
            (directory / "more").write_bytes(bytes(128 << 10))
        assert list((tmp_path / "small").iterdir()) == []
    except UnsupportedError as error:
        pytest.skip(str(error))


def test_a_large_file_system_is_not_filled(tmp_path: Path) -> None:
    class Large:
        f_bavail, f_frsize = 1 << 30, 4096

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.statvfs", lambda _: Large)
        with pytest.raises(RequestError, match="is for small ones"):
            fill_up(tmp_path)


async def test_a_controller_is_killed_at_a_moment(tmp_path: Path) -> None:
    program = "import time; print('ready', flush=True); time.sleep(60)"
    async with Controller([sys.executable, "-c", program], tmp_path) as controller:
        await controller.wait_for_output("ready")
        with pytest.raises(StalledError, match="did not end"):
            await controller.wait(0.05)
        assert controller.kill() == -signal.SIGKILL
    assert controller.stdout == "ready\n"


async def test_a_controller_that_ends_without_the_output(tmp_path: Path) -> None:
    program = "import sys; sys.exit('no luck')"
    async with Controller([sys.executable, "-c", program], tmp_path) as controller:
        with pytest.raises(ToolError, match="exit code 1: no luck"):
            await controller.wait_for_output("ready")
        assert await controller.wait() == 1
