"""What a hostile header leads to is opened by nobody; what it may lead to still is.

The images are of a user of her own, and root looks at them: so these run as root only.
"""

import asyncio
import contextlib
import os
import re
import shutil
import socket
import struct
import subprocess
import threading
from pathlib import Path

import pytest
from headers_of_eve import (
    EVE,
    HEADERS,
    SECRET,
    Place,
    backing,
    data_file,
    described,
    described_file,
    extents,
    in_file,
    open_to_all,
    over,
    with_data_file,
)

from qmpblock.errors import (
    DisconnectedError,
    Error,
    NotFoundError,
    StalledError,
    ToolError,
    UnsupportedError,
)
from qmpblock.host.handed import User
from qmpblock.host.imagechain import blockdev, format_of
from qmpblock.host.qemuimg import QemuImg

pytestmark = [
    pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-img is not here"),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else's deputy"),
]


@pytest.fixture
def place():
    with open_to_all() as directory:
        found = Place(directory)
        yield found
        found.close()


@pytest.fixture
def server(tmp_path):
    """A socket that nobody may connect to, for all that a header says."""
    path = tmp_path / "sock"
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(path))
    listening.listen()
    listening.setblocking(False)
    path.chmod(0o777)
    yield path
    with contextlib.closing(listening), pytest.raises(BlockingIOError):
        listening.accept()


async def look(path, **options):
    """Look at a closed image, as `qmpblock map IMAGE` does."""
    tool = QemuImg(**options)
    chain = await tool.chain(str(path), format_of(str(path)))
    stacked = blockdev(chain[0].format, chain[0].file, chain[1:])
    found = await tool.map(stacked, [one.format for one in chain])
    for one in chain:
        await tool.map(blockdev(one.format, one.file), [one.format], opener=one.opener)
    return found


@pytest.mark.parametrize("header", HEADERS, ids=lambda header: header.__name__)
async def test_root_does_not_follow_a_header_for_its_owner(header, place, server):
    header(place, server)
    top = place.finish()
    with pytest.raises(Error) as caught:
        await look(top)
    assert "/proc/self/fd" not in str(caught.value)
    assert not isinstance(caught.value, StalledError)  # it has not waited for what it names
    assert not place.opened()
    assert place.secret.read_bytes() == SECRET


@pytest.mark.parametrize(("group", "mode"), [(EVE, 0o660), (0, 0o666)])
@pytest.mark.parametrize("header", [data_file, backing, described_file, extents])
async def test_nor_for_root_where_others_may_write_to_the_image(header, group, mode, place, server):
    """An image of root's in a group of QEMU's user: who has broken out has written its header."""
    header(place, server)
    top = place.finish()
    for file in place.eve.iterdir():
        os.chown(file, 0, group)
        file.chmod(mode)
    who = f"the group {group}" if group else "everybody"
    with pytest.raises(UnsupportedError, match=f"the image belongs to {who}, who may not open it"):
        await look(top)
    assert not place.opened()


def test_who_may_write_to_a_file_of_roots(tmp_path):
    path, nobody = tmp_path / "image", 65534
    path.touch()

    def whose(mode, group=0, *entries):
        os.chown(path, 0, group)
        path.chmod(mode)
        if entries:
            # Owner, those, the owning group, all that any of them may, others.
            whole = [(1, 6, 2**32 - 1), *entries, (4, 0, 2**32 - 1)]
            whole += [(16, 6, 2**32 - 1), (32, 0, 2**32 - 1)]
            packed = b"".join(struct.pack("<HHI", *one) for one in sorted(whole))
            os.setxattr(path, "system.posix_acl_access", struct.pack("<I", 2) + packed)
        fd = os.open(path, os.O_PATH)
        try:
            return User.of_file(fd)
        finally:
            os.close(fd)

    assert whose(0o644, EVE) == User(0, EVE)
    assert whose(0o660) == User(0, 0)  # root's own group
    assert whose(0o660, EVE) == User(nobody, EVE)
    assert whose(0o666, EVE) == User(nobody, nobody)
    try:
        assert whose(0o660, 0, (2, 6, EVE)) == User(EVE, nobody)
    except OSError as error:
        pytest.skip(f"no access control lists here: {error.strerror}")
    assert whose(0o660, 0, (2, 4, EVE)) == User(0, 0)  # she may read
    assert whose(0o660, 0, (8, 6, EVE)) == User(nobody, EVE)
    assert whose(0o660, 0, (2, 6, EVE), (2, 6, EVE + 1)) == User(nobody, nobody)


async def test_what_the_group_may_read_is_followed(place):
    place.hers.write_bytes(b"x" * 65536)
    over(place.top, place.hers)
    place.finish()
    place.eve.chmod(0o750)
    for file in place.eve.iterdir():
        os.chown(file, 0, EVE)
        file.chmod(0o660)
    assert (await look(place.top)).where(depth=1, data=True).total == 65536


async def test_the_test_sees_what_is_opened(place):
    place.finish()
    place.secret.read_bytes()
    assert place.opened()


@pytest.mark.parametrize("name", ["absolute", "relative", "link", "described"])
async def test_what_is_the_owners_is_still_followed(name, place):
    names = {
        "absolute": place.hers,
        "relative": "./hers.raw",
        "link": "link",
        "described": described(
            driver="raw", offset=4096, size="8K", file=in_file(place.hers), discard="unmap"
        ),
    }
    place.hers.write_bytes(b"x" * 65536)
    (place.eve / "link").symlink_to("hers.raw")
    over(place.top, names[name])
    found = await look(place.finish())
    assert found.where(depth=1, data=True).total == (8192 if name == "described" else 65536)


async def test_what_others_let_the_owner_read_is_followed(place):
    place.root.chmod(0o755)
    over(place.top, place.hidden)
    assert (await look(place.finish())).where(depth=1, data=True).total == len(SECRET)


async def test_a_data_file_of_the_owner(place, monkeypatch):
    with_data_file(place.top, place.hers)
    place.finish()
    assert (await look(place.top)).stop == 65536
    # What QEMU takes from the directory that it runs in is taken from ours.
    monkeypatch.chdir(place.eve)
    with_data_file(place.eve / "beside.qcow2", "./hers.raw")
    place.finish()
    assert (await look("beside.qcow2")).stop == 65536
    place.hers.unlink()
    with pytest.raises(NotFoundError, match="hers"):
        await look(place.top)


async def test_extents_of_the_owner(place):
    extents(place, None, ["hers.raw"])
    assert (await look(place.finish())).where(data=True).total == 65536


async def test_what_is_root_s_own_root_follows(place):
    """Nobody else has written it; and root may open what others own, as ever."""
    top = over(place.root / "top.qcow2", place.hers)
    place.finish()
    assert (await look(top)).layers == 2
    extents(place, None)
    top = place.root / "top.vmdk"
    place.top.rename(top)
    assert (await look(top)).stop == 65536


async def test_each_header_is_followed_for_its_own_owner(place):
    """Another's overlay is readable for all; what lies below hers is not hers to name."""
    data_file(place, None)
    place.finish()
    place.top.chmod(0o644)
    place.eve.chmod(0o755)
    above = over(place.root / "above.qcow2", place.top, "qcow2")
    with pytest.raises(UnsupportedError, match=f"secret.raw.*user {EVE}"):
        await look(above)
    assert not place.opened()


async def test_why_and_what_to_do(place):
    backing(place, None)
    with pytest.raises(UnsupportedError, match="may not open it") as caught:
        await look(place.finish())
    assert f"'{place.secret}': Permission denied" in caught.value.message
    assert f"belongs to user {EVE}" in caught.value.message
    assert "give them the right" in caught.value.remedy


async def test_errors_name_the_files_themselves(place):
    place.top.write_bytes(b"nonsense" * 100)
    with pytest.raises(ToolError, match="not in qcow2 format") as caught:
        await look(place.finish())
    assert str(place.top) in caught.value.stderr
    assert caught.value.command == ("qemu-img", "info", "--output=json", str(place.top))
    assert "/proc/self" not in str(caught.value)


async def test_a_block_device(place):
    made = subprocess.run(
        ["losetup", "--find", "--show", place.hidden], capture_output=True, text=True, check=False
    )
    if made.returncode:
        pytest.skip(f"no loop device can be made here: {made.stderr.strip()}")
    try:
        device = made.stdout.strip()
        top = over(place.root / "top.qcow2", device)
        assert (await look(top)).where(depth=1, data=True).total == len(SECRET)
        over(place.top, device)
        with pytest.raises(UnsupportedError, match="may not open it"):
            await look(place.finish())
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


async def test_it_runs_as_the_owner_and_has_nothing(place):
    """What the program may do is told by one that stands for it."""
    program = place.hidden.parent.parent / "program"
    program.write_text("#!/bin/sh\nulimit -c >&2; exec sleep 60\n")
    program.chmod(0o755)
    place.top.write_bytes(b"")
    looking = asyncio.create_task(look(place.finish(), program=str(program)))
    me = Path(f"/proc/self/task/{threading.get_native_id()}/children")
    status = {}
    while status.get("Name") != ["sleep"]:
        await asyncio.sleep(0.01)
        for pid in me.read_text().split():
            with contextlib.suppress(OSError):
                lines = Path(f"/proc/{pid}/status").read_text().splitlines()
                limits = Path(f"/proc/{pid}/limits").read_text()
                status = {line.partition(":")[0]: line.split()[1:] for line in lines}
    looking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await looking
    assert status["Uid"] == status["Gid"] == [str(EVE)] * 4
    assert status["Groups"] == []
    for kind in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert int(status[kind][0], 16) == 0
    assert status["NoNewPrivs"] == ["1"]
    assert status["Seccomp"] == ["2"]
    assert re.search(r"Max core file size +0 +0 ", limits)
    assert me.read_text() == ""


def test_whose_a_process_is():
    assert User.of_process(os.getpid()).uid == os.geteuid()
    process = subprocess.Popen(["true"])
    process.wait()
    with pytest.raises(DisconnectedError, match=f"the VM's process {process.pid} has ended"):
        User.of_process(process.pid)
