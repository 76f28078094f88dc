"""What is a snapshot's own: one point for several disks, names, formats, keys, bitmaps."""

import asyncio
import json
import os
import struct

import pytest
from chains import bitmaps, cli, convert, dirty, nothing_left, subjects

import qmpblock
from qmpblock.errors import RequestError, UnsupportedError
from qmpblock.testing.images import Tools, build

pytestmark = pytest.mark.live

CHAIN = pytest.mark.scenarios("chain-3.yaml")
MIB = 1 << 20


@pytest.mark.scenarios("several-disks.yaml", "two-disks-one-base.yaml")
async def test_several_disks_at_one_point(scenario, start_qemu, invariant, vm_dir, qemu_binary):
    """The guest writes to two disks in turn; frozen, they are never more than one write apart."""
    built = await build(scenario, vm_dir / "images", Tools.of(qemu_binary))
    every = await subjects(built, vm_dir)
    vm = await start_qemu(built, guest=True)
    for one in every.values():
        await one.attach(vm)
    await invariant.begin(vm)
    pair = [one for one in every.values() if await vm.io.guest_number(one.disk) is not None][:2]
    assert len(pair) == 2
    numbers = [await vm.io.guest_number(one.disk) for one in pair]
    # A sector that holds no writer's block, nor anything but zeros of these scenarios.
    where = 3 * MIB - 512
    turns, stop = 0, asyncio.Event()

    async def write_in_turn():
        nonlocal turns
        while not stop.is_set():
            turns += 1
            for number in numbers:
                await vm.guest.write(number, where, 512, seq=turns, seed=9)

    writing = asyncio.create_task(write_in_turn())
    while turns < 10:
        await asyncio.sleep(0.01)
    before = {name: one.every_file() for name, one in every.items()}
    async with qmpblock.connect(vm.monitor_path) as controller:
        disks = {name: await controller.disk(one.path) for name, one in every.items()}
        result = await controller.snapshot(
            {disk: built.directory / f"{name}.overlay" for name, disk in disks.items()}
        )
        assert len(result.overlays) == len(every)
    for name, one in every.items():
        one.add_overlay(built.directory / f"{name}.overlay", "qcow2")
    seen = turns
    while turns < seen + 10:
        await asyncio.sleep(0.01)
    stop.set()
    await writing
    for name, one in every.items():
        await one.writer.stop()
        invariant.expect(one.documented(before=before[name], made=one.files[0]))
    await nothing_left(vm, every.values())
    await invariant.verify(vm)
    await vm.quit()
    for one in every.values():
        await one.verify_images()
    frozen = [await sequence(built.tools, one.layers[1], where, vm_dir) for one in pair]
    assert 10 <= frozen[0] <= seen
    assert frozen[0] - frozen[1] in (0, 1), frozen
    live = [await sequence(built.tools, one.layers[0], where, vm_dir) for one in pair]
    assert live == [turns, turns]


async def sequence(tools, image, where, directory):
    """Return the number of the write that a closed image holds in one sector."""
    content = directory / "content.raw"
    await convert(tools, image, image.describe(), content)
    with content.open("rb") as file:
        file.seek(where)
        stamp = file.read(512)
    content.unlink()
    return struct.unpack_from("<5I", stamp)[4]


@pytest.mark.scenarios("several-disks.yaml")
async def test_all_or_none(scenario, start_qemu, invariant, vm_dir):
    """One of the overlays exists already: no disk gets one."""
    vm = await start_qemu(scenario)
    taken = vm_dir / "taken"
    taken.write_text("precious")
    async with qmpblock.connect(vm.monitor_path) as controller:
        disks = [await controller.disk(await vm.io.qom_path(disk)) for disk in vm.disks]
        names = [vm_dir / f"overlay{number}" for number in range(len(disks) - 1)]
        with pytest.raises(RequestError, match="exists already") as caught:
            await controller.snapshot(dict(zip(disks, [*names, taken], strict=True)))
        assert "nothing was touched" in str(caught.value)
        with pytest.raises(RequestError, match="no directory"):
            await controller.snapshot({disks[0]: vm_dir / "nosuch" / "overlay"})
        with pytest.raises(RequestError, match="named for two"):
            await controller.snapshot(dict.fromkeys(disks[:2], names[0]))
    assert taken.read_text() == "precious"
    assert not [name for name in names if name.exists()]


@pytest.mark.scenarios("chain-5-names.yaml", "chain-absolute.yaml", "raw-unaligned.yaml")
@pytest.mark.parametrize("fmt", ["qcow2", "qed"])
@pytest.mark.parametrize("naming", ["relative", "absolute"])
@pytest.mark.parametrize("name", ["overlay", "elsewhere/over: lay,\"'%20é"], ids=["beside", "far"])
async def test_names_and_formats(
    scenario, fmt, naming, name, start_qemu, invariant, vm_dir, qemu_binary
):
    built = await build(scenario, vm_dir / "images", Tools.of(qemu_binary))
    subject = (await subjects(built, vm_dir))["d0"]
    before, active = subject.every_file(), subject.layers[0].path
    overlay = vm_dir / "images" / name
    overlay.parent.mkdir(exist_ok=True)
    vm = await start_qemu(built, guest=True)
    await subject.attach(vm)
    await invariant.begin(vm)
    async with qmpblock.connect(vm.monitor_path) as controller:
        disk = await controller.disk("vd0")
        result = await disk.snapshot(overlay, format=fmt, backing_name=naming)
        assert disk.chain.active.format == fmt
    subject.add_overlay(overlay, fmt, naming)
    await subject.keeps_writing()
    await subject.writer.stop()
    invariant.expect(subject.documented(before=before, made=str(overlay)))
    await nothing_left(vm, [subject])
    await invariant.verify(vm)
    await vm.quit()
    expected = str(active) if naming == "absolute" else os.path.relpath(active, overlay.parent)
    if ":" in expected.partition("/")[0]:
        expected = f"./{expected}"
    printed = await built.tools.run(
        built.tools.img, "info", "-f", fmt, "--output=json", str(overlay)
    )
    assert json.loads(printed)["backing-filename"] == expected
    assert result.overlays[0].backing_name == expected
    assert overlay.stat().st_mode == active.stat().st_mode
    await subject.verify()


@pytest.mark.scenarios("luks.yaml", "qcow2-luks.yaml")
async def test_an_encrypted_disks_overlay_holds_no_plaintext(
    scenario, start_qemu, invariant, vm_dir, qemu_binary
):
    built = await build(scenario, vm_dir / "images", Tools.of(qemu_binary))
    vm = await start_qemu(built, guest=True)
    invariant.forget(vm)  # test_chains.py looks at the VM
    overlay = built.directory / "overlay"
    async with qmpblock.connect(vm.monitor_path) as controller:
        disk = await controller.disk("vd0")
        with pytest.raises(UnsupportedError, match="encrypted"):
            await disk.snapshot(overlay, format="qed")
        assert not overlay.exists()
        await disk.snapshot(overlay)
        assert disk.chain.active.node.encrypted
        await vm.guest.fill(0, MIB, 65536, 0x5C)
        await vm.guest.flush(0)
        await vm.qemu_io("d0", f"read -P 0x5c {MIB} 65536")
    await vm.quit()
    assert overlay.stat().st_blocks * 512 > 65536  # it is in there
    for file in built.directory.iterdir():
        assert b"\x5c" * 512 not in file.read_bytes(), file


@CHAIN
@pytest.mark.parametrize("fmt", ["qcow2", "qed"])
async def test_bitmaps_go_on_in_the_overlay(fmt, scenario, start_qemu, invariant, vm_dir):
    vm = await start_qemu(scenario)
    invariant.forget(vm)  # the bitmaps are the test's
    for name, options in {
        "transient": {"granularity": 32768},
        "stored": {"persistent": True},
        "stopped": {"disabled": True},
    }.items():
        await vm.execute("block-dirty-bitmap-add", node="d0", name=name, **options)
    await vm.qemu_io("d0", "write -P 1 1M 64K")
    overlay = vm_dir / "images0" / "overlay"
    code, out, err = await cli(
        "snapshot", vm.monitor_path, f"vd0={overlay}", "--format", fmt, "--json"
    )
    found = json.loads(out)
    assert code == (0 if fmt == "qcow2" else 4), err
    assert len(found["warnings"]) == (0 if fmt == "qcow2" else 1)
    assert all("stored" in warning for warning in found["warnings"])
    node = found["overlays"][0]["node"]
    kept = {one["name"]: one for one in await bitmaps(vm, node)}
    assert set(kept) == {"transient", "stored"}
    assert kept["transient"]["granularity"] == 32768
    assert kept["stored"]["persistent"] == (fmt == "qcow2")
    await vm.qemu_io("d0", "write -P 2 9M 64K")
    assert await dirty(vm, node, "stored") == {9 * MIB}
    assert await dirty(vm, node, "transient") == {9 * MIB, 9 * MIB + 32768}


@CHAIN
async def test_an_overlay_is_of_a_format_that_can_be_one(scenario, start_qemu, invariant, vm_dir):
    vm = await start_qemu(scenario)
    async with qmpblock.connect(vm.monitor_path) as controller:
        disk = await controller.disk("vd0")
        for fmt in ("raw", "vmdk", "luks"):
            with pytest.raises(UnsupportedError, match=fmt):
                await disk.snapshot(vm_dir / "overlay", format=fmt)
