"""A closed image served to us by a qemu-nbd that can do nothing else."""

import asyncio
import contextlib
import os
import stat
import subprocess
import tempfile
from pathlib import Path

import pytest

from qmpblock.errors import (
    InUseError,
    NBDError,
    NoRoomError,
    NotFoundError,
    ToolError,
    UnsupportedError,
)
from qmpblock.host import qemunbd
from qmpblock.host.qemunbd import QemuNbd

MIB = 1 << 20


def leaf(path, fmt="raw"):
    return {"driver": fmt, "file": {"driver": "file", "filename": str(path)}}


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "image"
    path.write_bytes(b"\1" * MIB)
    return path


def children():
    """Return the processes that this one has started, by what they run."""
    found = {}
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):
            for pid in (task / "children").read_text().split():
                found[int(pid)] = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    return found


async def test_it_is_read_and_nothing_is_left(image):
    before = set(Path(tempfile.gettempdir()).iterdir())
    async with QemuNbd().serving(leaf(image)) as client:
        assert (client.size, client.read_only, client.contexts) == (MIB, True, ("base:allocation",))
        assert await client.read(MIB - 3, 3) == b"\1\1\1"
        assert children()
        assert not [
            one
            for one in set(Path(tempfile.gettempdir()).iterdir()) - before
            if "read-" in str(one)
        ]
    assert not children()


async def test_it_has_no_rights(image):
    """It is its parent's user, or the image's owner, and can make no socket."""
    async with QemuNbd().serving(leaf(image)):
        [pid] = children()
        status = Path(f"/proc/{pid}/status").read_text()
        said = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
        assert (said["NoNewPrivs"], said["Seccomp"]) == ("1", "2")
        owner = image.stat().st_uid
        assert set(said["Uid"].split()) == {str(owner)}
        kinds = [os.readlink(one).partition(":")[0] for one in Path(f"/proc/{pid}/fd").iterdir()]
        assert kinds.count("socket") <= 2  # its end of the connection, and where it listened


async def test_what_cannot_be_opened_says_why(image, tmp_path):
    tool = QemuNbd()
    for options, error, words in (
        (leaf(tmp_path / "none"), NotFoundError, "no image"),
        (leaf(image, "qcow2"), ToolError, "not in qcow2 format"),
        (leaf(tmp_path), UnsupportedError, "no regular file"),
        ({"driver": "nbd", "path": "/x"}, UnsupportedError, "no format of image files"),
    ):
        with pytest.raises(error, match=words) as caught:
            async with tool.serving(options):
                pass
        assert "/proc/self/fd" not in str(caught.value)
    with pytest.raises(ToolError, match="no program qemu-none"):
        async with QemuNbd("qemu-none").serving(leaf(image)):
            pass
    assert not children()


async def test_what_a_qemu_writes_to_is_refused(tmp_path):
    """By its locks. Of a raw image QEMU's tools do not mind: `qmpblock.host.writers` does."""
    path = tmp_path / "image"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, "1M"], check=True)
    writer = subprocess.Popen(
        ["qemu-io", "-f", "qcow2", path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        writer.stdin.write(b"read 0 512\n")
        writer.stdin.flush()
        writer.stdout.readline()  # it has it open
        with pytest.raises(InUseError, match=r"in use.*lock") as caught:
            async with QemuNbd().serving(leaf(path, "qcow2")):
                pass
        assert caught.value.exit_code == 2
    finally:
        writer.communicate(b"quit\n")


async def test_cancelled_it_ends_at_once(image):
    began = asyncio.Event()

    async def serve():
        async with QemuNbd().serving(leaf(image)):
            began.set()
            await asyncio.sleep(60)

    task = asyncio.ensure_future(serve())
    await began.wait()
    assert children()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not children()


async def test_a_data_file_that_a_header_names_is_handed(tmp_path):
    image = tmp_path / "i.qcow2"
    create = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", f"data_file={tmp_path}/data.raw"]
    subprocess.run([*create, image, "1M"], check=True)
    write = ["qemu-io", "-f", "qcow2", "-c", "write -q -P 5 64K 64K"]
    subprocess.run([*write, image], check=True)
    async with QemuNbd().serving(leaf(image, "qcow2")) as client:
        assert await client.read(64 << 10, 2) == b"\5\5"


def test_the_socket_is_only_ours(monkeypatch, tmp_path):
    made = []
    real = tempfile.mkdtemp

    def mkdtemp(**options):
        made.append(real(**options))
        made.append(stat.S_IMODE(os.stat(made[0]).st_mode))
        return made[0]

    monkeypatch.setattr(tempfile, "mkdtemp", mkdtemp)
    with qemunbd._listening() as (listening, connection):
        connection.close()
        assert made[1] == 0o700
        assert not Path(made[0]).exists()
        assert listening.getsockname().startswith("/proc/self/fd/")
    # Where there is no room for it, that is said.
    monkeypatch.setattr(tempfile, "mkdtemp", lambda **_: str(tmp_path / "gone"))
    with pytest.raises(NoRoomError, match="no socket"), qemunbd._listening():
        pass


async def test_a_server_that_dies_under_a_reader(image):
    async with QemuNbd().serving(leaf(image)) as client:
        [pid] = children()
        os.kill(pid, 9)
        with pytest.raises(NBDError):
            await client.read(0, MIB)
    assert not children()


async def test_cancelled_one_that_does_not_answer_ends_too(image, tmp_path):
    script = tmp_path / "qemu-nbd"
    script.write_text("#!/bin/sh\nexec sleep 6150.5\n")
    script.chmod(0o755)

    async def serve():
        async with QemuNbd(str(script)).serving(leaf(image)):
            pass

    task = asyncio.ensure_future(serve())
    while not any(b"6150.5" in words for words in children().values()):
        await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not children()  # and nobody has waited for it
