"""Zeros written into a frozen image: what the guest sees meanwhile, and what it costs."""

import asyncio
import json
import time
from pathlib import Path

import pytest
from allocating import at_command, content
from chains import cli
from disturbed import nothing_of_ours

import qmpblock
from qmpblock.allocation.filling import Parts
from qmpblock.errors import BusyError
from qmpblock.testing import faults
from qmpblock.testing.images import Tools, build
from qmpblock.testing.scenario import parse_scenario

pytestmark = pytest.mark.live

KIB, MIB, TIB = 1 << 10, 1 << 20, 1 << 40
#: Data in every second cluster of 4 KiB: a filter's unit of 64 KiB holds both.
CHEQUERED = """\
about: Data and blanks in turn, in clusters smaller than what copy-before-write keeps at once.
images:
  - size: 64M
    options: {{cluster_size: 4K{more}}}
    {secret}
    content: [write 8M 4K A every 8K times 64, write 0 4K B]
"""
LUKS = ", encrypt.format: luks, encrypt.iter-time: 10"


def chequered(*, encrypted):
    more, secret = (LUKS, "secret: open sesame") if encrypted else ("", "")
    return parse_scenario(CHEQUERED.format(more=more, secret=secret), "chequered")


async def running(start_qemu, vm_dir, qemu_binary, scenario, change=lambda disk: disk):
    built = await build(scenario, vm_dir / "images", Tools.of(qemu_binary))
    disks = [change(disk) for disk in built.disks]
    image = built.disks[0].active
    plain = image.spec.size <= 64 * MIB and not image.secret
    before = await content(image, built.tools) if plain else b""
    return await start_qemu(disks, guest=True), built, before


# -- what it costs


async def seconds_of_4_mib(start_qemu, vm_dir, qemu_binary, size, offset):
    text = f"about: A blank disk.\nimages: [{{file: s{size}.qcow2, size: {size}}}]\n"
    vm, *_ = await running(start_qemu, vm_dir, qemu_binary, parse_scenario(text, "blank"))
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        began = time.monotonic()
        result = await disk.allocate(offset, 4 * MIB, full=True)
        seconds = time.monotonic() - began
    assert result.reserved == 4 * MIB
    await nothing_of_ours(vm)
    await vm.quit()
    return seconds


async def test_it_costs_what_is_asked_and_not_what_the_disk_is(start_qemu, vm_dir, qemu_binary):
    """A commit of a middle layer took 10 s for 2 TiB, wherever the range was."""
    small = await seconds_of_4_mib(start_qemu, vm_dir, qemu_binary, 64 * MIB, 8 * MIB)
    large = await seconds_of_4_mib(start_qemu, vm_dir, qemu_binary, 2 * TIB, 2 * TIB - 4 * MIB)
    assert large < 2 * small + 3, (small, large)


async def test_progress_is_told_while_a_slice_is_written(
    start_qemu, vm_dir, qemu_binary, invariant
):
    text = "about: A blank disk.\nimages: [{size: 64M}]\n"
    vm, *_ = await running(
        start_qemu,
        vm_dir,
        qemu_binary,
        parse_scenario(text, "blank"),
        lambda disk: faults.slow(disk, 8 * MIB),
    )
    told = []
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        result = await disk.allocate(0, 16 * MIB, full=True, progress=told.append)
    assert result.reserved == 16 * MIB
    assert {(seen.phase, seen.total) for seen in told} == {("reserving", 16 * MIB)}
    done = [seen.done for seen in told]
    assert done == sorted(done)
    assert any(0 < now < 16 * MIB for now in done), done
    assert any(seen.rate > 0 and seen.eta for seen in told)


# -- what is seen meanwhile


@pytest.mark.parametrize("encrypted", [False, True], ids=["plain", "luks"])
async def test_what_lies_beside_the_ranges_stays_to_be_seen(
    encrypted, start_qemu, vm_dir, qemu_binary, invariant
):
    """The filter keeps whole units, data beside the blanks too: what it keeps must be true.

    Of an encrypted image it must not lie about in plain text, either.
    """
    vm, built, before = await running(
        start_qemu, vm_dir, qemu_binary, chequered(encrypted=encrypted)
    )
    wanted = b"A" * 4096
    seen, kept = [], []
    async with (
        qmpblock.connect(vm.monitor_path) as controller,
        qmpblock.connect(vm.second_monitor_path) as other,
    ):
        [disk] = await controller.disks()

        async def look():
            chain = (await other.disk("vd0")).chain
            assert chain.veiled
            [parts] = {node.removeprefix("qmpblock-")[:8] for node in await ours(other)}
            path = Parts(parts, f"{built.disks[0].active.path}.qmpblock-{parts}").kept
            kept.append(Path(path).read_bytes())
            for place in range(8 * MIB, 8 * MIB + 128 * KIB, 8 * KIB):
                seen.append(await vm.guest.read(0, place, 4 * KIB))

        reference = await vm.guest.read(0, 8 * MIB, 4 * KIB)
        with at_command(controller.monitor, "job-cancel", look):  # all is copied by then
            result = await disk.allocate(8 * MIB, MIB, full=True)
        assert seen == [reference] * 16
        [image] = kept
        assert (wanted in image) == (not encrypted), "what lay beside was kept"
    assert result.reserved == MIB - 64 * 4 * KIB
    await nothing_of_ours(vm)
    await vm.quit()
    await built.disks[0].active.check(built.tools)
    if before:
        assert await content(built.disks[0].active, built.tools) == before


async def ours(controller):
    return [name for name in (await controller.graph()).nodes if name.startswith("qmpblock-")]


async def test_a_map_waits_until_it_tells_the_layers_again(
    start_qemu, vm_dir, qemu_binary, invariant
):
    """Through the view QEMU shows all that lies below as one layer."""
    text = (
        "about: A chain.\nimages: [{size: 64M, content: [write 0 1M A]}, "
        "{content: [write 2M 1M B]}, {}]\n"
    )
    vm, *_ = await running(start_qemu, vm_dir, qemu_binary, parse_scenario(text, "chain"))
    maps = []
    async with (
        qmpblock.connect(vm.monitor_path) as controller,
        qmpblock.connect(vm.second_monitor_path, stall=1) as other,
    ):
        [disk] = await controller.disks()
        await disk.allocate(2 * MIB, MIB)

        async def look():
            [theirs] = await other.disks()
            with pytest.raises(BusyError, match="snapshot-access"):
                await theirs.map()
            other.stall = 30
            maps.append(asyncio.create_task(theirs.map()))
            layers.append(asyncio.create_task((await other.disks())[0].layers()))

        layers = []
        with at_command(controller.monitor, "block-commit", look):
            await disk.allocate(8 * MIB, MIB, full=True)
        [found] = maps
        seen = await found
        assert seen.layers >= 3
        assert seen.where(depth=seen.layers - 1, data=True).total == MIB
        [each] = layers
        assert len(await each) >= 3


# -- what may go wrong


@pytest.mark.parametrize("command", ["blockdev-reopen", "block-commit", "blockdev-del"])
async def test_a_controller_dies_and_its_lock_is_removed(
    command, start_qemu, vm_dir, qemu_binary, invariant, monkeypatch
):
    """Its names and its journal suffice. Here it does not die, but forgets all about it."""
    vm, built, before = await running(start_qemu, vm_dir, qemu_binary, chequered(encrypted=False))

    async def forget(_):
        return False

    def die():
        raise RuntimeError("it died")

    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        monkeypatch.setattr("qmpblock.changes.change.Change.undo", forget)
        with at_command(controller.monitor, command, die), pytest.raises(RuntimeError):
            await disk.allocate(8 * MIB, MIB, full=True)
        assert len(await ours(controller)) == 10
        for lock in await controller.monitor.execute("qom-list", {"path": "/objects"}):
            if lock["name"].startswith("qmpblock-"):
                await controller.monitor.execute("object-del", {"id": lock["name"]})
    code, out, err = await cli("recover", vm.monitor_path, "--json")
    assert code == 0, err
    assert json.loads(out)
    await nothing_of_ours(vm)
    await vm.guest.fill(0, 32 * MIB, 4096, 0x11)
    await vm.quit()
    expected = bytearray(before)
    expected[32 * MIB : 32 * MIB + 4096] = b"\x11" * 4096
    assert await content(built.disks[0].active, built.tools) == bytes(expected)
    await built.disks[0].active.check(built.tools)
