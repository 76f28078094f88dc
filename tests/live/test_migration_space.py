"""Host space at the destination, as it is asked for: of every byte, or as at the source."""

import json
import os

import pytest
from chains import cli
from disturbed import nothing_of_ours
from migrating import MIB, at, migrated, stays, stressed

from qmpblock.errors import UnsupportedError
from qmpblock.host.fallocate import keep_size
from qmpblock.testing import Tools, build, parse_scenario

pytestmark = pytest.mark.live

SIZE = 64 * MIB
ATTACH = "{discard: unmap}"


@pytest.fixture
def begin(start_qemu, vm_dir, qemu_binary):
    """Give what starts a source whose guest writes to its disk; `reserved` MiB of it are zeros."""

    async def start(image="qcow2", *, content="write 0 8M 0xaa, zero 30M 2M", reserved=0):
        images = f"[{{size: 64M, format: {image}, content: [{content}]}}]"
        text = f"about: One.\ndisks:\n  - {{name: d0, images: {images}, attach: {ATTACH}}}\n"
        tools = Tools.of(qemu_binary)
        built = await build(parse_scenario(text, "source"), vm_dir / "source", tools)
        if reserved:
            fd = os.open(built.disks[0].active.path, os.O_WRONLY)
            keep_size(fd, 40 * MIB, reserved * MIB)
            os.close(fd)
        return await stressed(await start_qemu(built, guest=True), 100)

    return start


@pytest.fixture
def preallocated(start_qemu, vm_dir, qemu_binary, invariant):
    """Give what starts a destination whose image has host space for all of itself."""

    async def start(source):
        text = (
            "about: One.\ndisks:\n  - {name: d0, images: [{size: 64M, format: qcow2, "
            "options: {preallocation: falloc}}], attach: {discard: unmap}}\n"
        )
        tools = Tools.of(qemu_binary)
        built = await build(parse_scenario(text, "there"), vm_dir / "preallocated", tools)
        vm = await start_qemu(
            built, machine=source.machine, incoming="defer", guest=True, extra=["-S"]
        )
        invariant.forget(vm)
        return vm

    return start


def held(vm):
    return vm.disks[0].active.path.stat().st_blocks * 512


async def content(source, vm):
    """Return what the guest finds at the destination, and the room that its image takes."""
    await source.quit()
    guest = await vm.attach_guest()
    end = await guest.stop_stress()
    assert (end.bad, end.errors) == (0, 0)
    assert await guest.check() > 0
    await vm.quit()
    active, tools = vm.disks[0].active, Tools.of(vm.command[0])
    raw = active.path.parent / "content"
    words = ("convert", "-f", active.spec.format, "-O", "raw", str(active.path), str(raw))
    await tools.run(tools.img, *words)
    await active.check(tools)
    return raw.read_bytes(), held(vm)


@pytest.mark.parametrize(
    ("here", "there", "daemon"), [("qcow2", "raw", False), ("raw", "qcow2", True)]
)
async def test_every_byte_has_host_space(
    here, there, daemon, begin, start_destination, preallocated
):
    """Of a qcow2 image where it was made so; and no zero of the source's takes it away."""
    source = await begin(here)
    destination = await start_destination(source, image=there)
    if there == "qcow2":
        with pytest.raises(UnsupportedError, match="gets all of it only as it is made"):
            await migrated(source, destination, allocation="full")
        await destination.quit()
        destination = await preallocated(source)
    words = (source.monitor_path, destination.monitor_path, "--allocation", "full")
    code, out, err = await cli("migrate", *words, "--dry-run")
    assert code == 0, err
    assert "with host space for every byte" in out
    await migrated(source, destination, allocation="full", storage_daemon=daemon)
    await nothing_of_ours(destination)
    data, room = await content(source, destination)
    assert room >= SIZE
    assert data[: 8 * MIB] == b"\xaa" * (8 * MIB)
    assert data[30 * MIB : 32 * MIB] == bytes(2 * MIB)


async def test_what_has_host_space_has_it_there_and_nothing_else(begin, start_destination):
    source = await begin("raw", content="write 0 8M 0xaa", reserved=16)
    destination = await start_destination(source, image="raw")
    await migrated(source, destination, allocation="same", storage_daemon=True)
    before = held(source)
    data, room = await content(source, destination)
    assert before - MIB <= room < 30 * MIB  # the guest has gone on writing to 4 MiB of it
    assert room >= 24 * MIB
    assert data[40 * MIB :] == bytes(24 * MIB)


async def test_where_it_cannot_have_the_same_it_is_refused(begin, start_destination, invariant):
    source = await begin("raw", content="write 0 8M 0xaa", reserved=16)
    destination = await start_destination(source, image="qcow2")
    words = ("migrate", source.monitor_path, destination.monitor_path, "--allocation", "same")
    for more in ((), ("--dry-run",)):
        code, _, err = await cli(*words, *more)
        assert code == 2
        assert "16777216 bytes of zeros have host space" in err
    await stays(source, invariant)
    code, out, _ = await cli(*words[:-1], "full", "--dry-run", "--json")
    assert code == 2
    assert [one["name"] for one in json.loads(out)["findings"]] == ["space"]


class BrokenOffError(Exception):
    pass


async def test_broken_off(begin, start_destination, invariant, monkeypatch):
    """Nothing is left of what keeps zeros from giving host space back."""
    source = await begin()
    destination = await start_destination(source, image="raw")
    destination.expect_exit()

    async def breaking():
        raise BrokenOffError

    with at(monkeypatch, "held", breaking), pytest.raises(BrokenOffError):
        await migrated(source, destination, allocation="full")
    await stays(source, invariant)
