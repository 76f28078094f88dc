"""The Linux guest: saved once, restored for each test, and what it is there for."""

from __future__ import annotations

import asyncio
import json
import subprocess
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from qmpblock.errors import RequestError, StalledError
from qmpblock.testing.images import Tools
from qmpblock.testing.linux import (
    LinuxGuest,
    LinuxImage,
    LinuxUnavailableError,
    ShellError,
)
from qmpblock.testing.qemu import QemuFailure

pytestmark = pytest.mark.live

MIB = 1 << 20


@pytest.fixture
async def image() -> LinuxImage:
    try:
        return await LinuxImage.prepare()
    except LinuxUnavailableError as error:
        pytest.skip(f"no Linux guest: {error}")


@pytest.fixture
async def linux(image: LinuxImage) -> AsyncIterator[LinuxGuest]:
    async with image.restore() as guest:
        yield guest


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """Make an empty qcow2 image of 64 MiB."""
    path = tmp_path / "disk.qcow2"
    command = [Tools.of().img, "create", "-q", "-f", "qcow2", path, "64M"]
    subprocess.run(command, check=True)
    return path


async def add_node(linux: LinuxGuest, path: Path, name: str = "d0") -> None:
    file = {"driver": "file", "filename": str(path)}
    await linux.vm.execute("blockdev-add", node_name=name, driver="qcow2", file=file)


def data_bytes(path: Path) -> int:
    """Return how many bytes of data a closed image holds, as qemu-img maps it."""
    command = [Tools.of().img, "map", "--output=json", "-f", "qcow2", path]
    records = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    return sum(record["length"] for record in records if record["data"])


async def test_it_goes_on_after_its_boot(image: LinuxImage) -> None:
    start = time.monotonic()
    async with image.restore() as linux:
        assert await linux.run("echo up") == (0, "up\n")
        spent = time.monotonic() - start
        uptime = float((await linux.check("cat /proc/uptime")).split()[0])
    print(f"restored and answered in {spent:.2f} s; up for {uptime:.1f} s")
    assert uptime > spent  # it did not boot just now


async def test_commands(linux: LinuxGuest) -> None:
    assert await linux.run("echo out; echo err >&2; exit 3") == (3, "out\nerr\n")
    assert await linux.run("printf 'no end, ü'") == (0, "no end, ü")
    assert await linux.run(f": {'x' * 20000}") == (0, "")
    assert len(await linux.check("head -c 100000 /dev/zero | tr '\\0' x")) == 64 << 10
    assert await linux.check("cat") == ""  # its input is empty
    with pytest.raises(ShellError, match="exit code 1: wrong") as caught:
        await linux.check("echo wrong; false")
    assert (caught.value.code, caught.value.output) == (1, "wrong\n")


async def test_a_command_that_hangs(image: LinuxImage) -> None:
    async with image.restore() as linux:
        with pytest.raises(StalledError, match="sleep 1000"):
            await linux.run("sleep 1000", timeout=0.5)


async def test_a_disk_is_plugged_in_written_and_unplugged(linux: LinuxGuest, disk: Path) -> None:
    await add_node(linux, disk)
    path = await linux.attach("d0", id="v0")
    assert path == "/dev/vda"
    assert await linux.check(f"blockdev --getsize64 {path}") == f"{64 * MIB}\n"
    write = f"dd of={path} bs=256k count=1 seek=4 iflag=fullblock conv=fsync"
    await linux.check(f"tr '\\0' Q </dev/zero | {write}")
    await linux.detach("v0")
    code, _ = await linux.run(f"test -e {path}")
    assert code == 1
    await linux.vm.execute("blockdev-del", node_name="d0")
    assert data_bytes(disk) == 4 * 65536
    command = [Tools.of().io, "-f", "qcow2", "-r", "-c", "read -P 0x51 1M 256k", disk]
    assert (
        "read 262144/262144"
        in subprocess.run(command, capture_output=True, text=True, check=True).stdout
    )


async def test_a_port_is_free_again(linux: LinuxGuest, tmp_path: Path, disk: Path) -> None:
    for number in range(5):
        copy = tmp_path / f"{number}.qcow2"
        copy.write_bytes(disk.read_bytes())
        await add_node(linux, copy, f"d{number}")
    for number in range(4):
        await linux.attach(f"d{number}", id=f"v{number}")
    with pytest.raises(RequestError, match="all 4 root ports"):
        await linux.attach("d4", id="v4")
    await linux.detach("v2")
    assert await linux.attach("d4", id="v4") == "/dev/vdc"


@pytest.mark.parametrize(
    ("driver", "options", "path"),
    [
        ("nvme", {"serial": "s0"}, "/dev/nvme0n1"),
        ("scsi-hd", {"bus": "scsi0.0"}, "/dev/sda"),
    ],
)
async def test_other_disks(
    linux: LinuxGuest, disk: Path, driver: str, options: dict[str, str], path: str
) -> None:
    await add_node(linux, disk)
    assert await linux.attach("d0", id="v0", driver=driver, **options) == path
    await linux.check(f"dd if=/bin/busybox of={path} bs=64k count=1 conv=fsync")
    await linux.detach("v0")
    await linux.vm.execute("blockdev-del", node_name="d0")
    assert data_bytes(disk) == 65536


async def test_a_file_system(linux: LinuxGuest, disk: Path) -> None:
    await add_node(linux, disk)
    path = await linux.attach("d0", id="v0")
    await linux.check(f"mke2fs {path} && mount {path} /mnt && echo hello >/mnt/file && umount /mnt")
    assert await linux.check(f"mount {path} /mnt && cat /mnt/file") == "hello\n"


async def test_the_power_button(linux: LinuxGuest, disk: Path) -> None:
    await add_node(linux, disk)
    path = await linux.attach("d0", id="v0")
    await linux.check(f"dd if=/bin/busybox of={path} bs=64k count=1")  # in its page cache
    with linux.vm.control.subscribe("SHUTDOWN") as shutdown:
        assert await linux.power_off() == 0
        event = await shutdown.get(5)
    assert event["data"]["reason"] == "guest-shutdown"
    assert data_bytes(disk) == 65536  # it wrote its cache first


async def test_two_at_once_do_not_meet(image: LinuxImage) -> None:
    async with image.restore() as one, image.restore() as other:
        await one.check("echo one >/tmp/file")
        await other.check("echo other >/tmp/file")
        assert await one.check("cat /tmp/file") == "one\n"
        assert await other.check("cat /tmp/file") == "other\n"


async def test_a_torn_file_is_told(image: LinuxImage, tmp_path: Path) -> None:
    torn = tmp_path / "saved"
    with image.snapshot.open("rb") as file:
        torn.write_bytes(file.read(20 * MIB))
    with pytest.raises(QemuFailure, match=r"(?s)exit code.*stderr"):
        async with LinuxImage(image.qemu, image.boot, torn).restore():
            pytest.fail("it was restored")


async def test_the_cache_serves_without_apt(
    image: LinuxImage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    again = await asyncio.wait_for(LinuxImage.prepare(image.qemu), 120)
    assert again == image
    with pytest.raises(LinuxUnavailableError, match="needs apt-cache"):
        await LinuxImage.prepare(image.qemu, tmp_path / "cache")
    assert {path.name for path in (tmp_path / "cache" / "linux").iterdir()} == {".lock"}
