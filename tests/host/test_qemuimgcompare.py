"""qemu-img compare: what it finds, and how it fails."""

import asyncio
import subprocess

import pytest

from qmpblock.errors import InUseError, NotFoundError, ToolError
from qmpblock.host.qemuimgcompare import QemuImgCompare

MIB = 1 << 20


def leaf(path, fmt="raw"):
    return {"driver": fmt, "file": {"driver": "file", "filename": str(path)}}


@pytest.fixture
def images(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    for path in (one, other):
        path.write_bytes(b"\1" * 4 * MIB)
    return one, other


async def compare(images, **options):
    return await QemuImgCompare(**options).compare(*map(leaf, images))


async def test_equal_ones(images):
    seen = []
    assert await QemuImgCompare().compare(*map(leaf, images), progress=seen.append) is None
    assert seen[-1] == 1.0
    assert seen == sorted(seen)


@pytest.mark.parametrize("at", [0, 511, 512, 4 * MIB - 1])
async def test_where_they_differ(images, at):
    with images[1].open("r+b") as file:
        file.seek(at)
        file.write(b"\2")
    place = await compare(images)
    assert place is not None
    assert place <= at < place + 512


async def test_a_longer_one_is_equal_if_its_rest_is_zeros(images):
    with images[1].open("r+b") as file:
        file.truncate(5 * MIB)
    assert await compare(images) is None
    with images[1].open("r+b") as file:
        file.seek(5 * MIB - 1)
        file.write(b"\2")
    assert await compare(images) == 5 * MIB - 512


async def test_what_fails_is_no_difference(images, tmp_path):
    with pytest.raises(NotFoundError):
        await compare((images[0], tmp_path / "none"))
    with pytest.raises(ToolError, match="not in qcow2 format"):
        await QemuImgCompare().compare(leaf(images[0]), leaf(images[1], "qcow2"))
    script = tmp_path / "qemu-img"
    script.write_text("#!/bin/sh\necho 'a traceback'\nexit 1\n")
    script.chmod(0o755)
    with pytest.raises(ToolError, match="exit code 1"):
        await compare(images, program=str(script))


async def test_what_a_qemu_writes_to_is_refused(images, tmp_path):
    path = tmp_path / "image"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, "4M"], check=True)
    writer = subprocess.Popen(
        ["qemu-io", "-f", "qcow2", path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        writer.stdin.write(b"read 0 512\n")
        writer.stdin.flush()
        writer.stdout.readline()
        with pytest.raises(InUseError, match="in use"):
            await QemuImgCompare().compare(leaf(images[0]), leaf(path, "qcow2"))
    finally:
        writer.communicate(b"quit\n")


async def test_cancelled_it_ends(images, tmp_path):
    script = tmp_path / "qemu-img"
    script.write_text("#!/bin/sh\nprintf '    (0.00/100%%)\\r'\nexec sleep 61.25\n")
    script.chmod(0o755)
    began = asyncio.Event()
    task = asyncio.ensure_future(
        QemuImgCompare(program=str(script)).compare(
            *map(leaf, images), progress=lambda _: began.set()
        )
    )
    await began.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert "61.25" not in subprocess.run(["ps", "ax"], capture_output=True, text=True).stdout
