"""What is refused before anything is touched: plaintext, read-only storage, a deadly query."""

import asyncio
import json
import os
from pathlib import Path

import pytest
from disturbed import nothing_of_ours

import qmpblock
from qmpblock.errors import BusyError, UnsupportedError
from qmpblock.testing.images import Tools, build
from qmpblock.testing.scenario import parse_scenario

pytestmark = pytest.mark.live
PATTERN = 0x5A  # no image of the fixtures has it

ENCRYPTED_MIDDLE = """\
about: An encrypted layer between plain ones.
images:
  - {size: 8M, content: [write 0 1M 0xaa]}
  - {options: {encrypt.format: luks}, secret: sesame, content: [write 1M 64K 0xbb]}
  - {content: [write 2M 64K 0xcc]}
"""


def files_below(*directories):
    """Return every regular file there, but what VMs print."""
    return [
        path
        for directory in directories
        for path in Path(directory).rglob("*")
        if path.is_file() and path.name not in ("stdout", "stderr")
    ]


def holds_pattern(path):
    return bytes([PATTERN]) * 64 in path.read_bytes()


# -- encryption


@pytest.mark.scenarios("luks.yaml", "qcow2-luks.yaml")
async def test_an_overlay_over_an_encrypted_disk_holds_no_plaintext(
    scenario, start_qemu, vm_dir, qemu_binary, invariant
):
    """The guest writes while it is made, and after; every file that is there is searched."""
    tools = Tools.of(qemu_binary)
    built = await build(scenario, vm_dir / "images", tools)
    vm = await start_qemu(built, guest=True)
    overlay = vm_dir / "images" / "overlay.qcow2"
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()

        async def write():
            for _ in range(8):
                await vm.guest.fill(0, 2 << 20, 128 << 10, PATTERN)

        writing = asyncio.create_task(write())
        await disk.snapshot(overlay)
        await writing
        await vm.guest.fill(0, 2 << 20, 128 << 10, PATTERN)
        assert disk.chain.active.file == str(overlay)
        assert disk.chain.active.node.encrypted
    await nothing_of_ours(vm)
    await vm.guest.flush(0)
    invariant.forget(vm)
    await vm.quit()
    assert overlay in files_below(vm_dir)
    assert [path for path in files_below(vm_dir) if holds_pattern(path)] == []
    image = built.disks[0].active
    name, data = image.secret
    escaped = data.replace(",", ",,")
    info = json.loads(await tools.run(tools.img, "info", "--output=json", str(overlay)))
    assert info["encrypted"] is True
    assert info["format-specific"]["data"]["encrypt"]["format"] == "luks"
    # It opens with the disk's own secret, and holds what the guest wrote.
    layer = {"driver": "qcow2", "encrypt": {"format": "luks", "key-secret": name}, "backing": None}
    layer["file"] = {"driver": "file", "filename": str(overlay)}
    raw = vm_dir / "plain.raw"
    await tools.run(
        tools.img,
        *("convert", "--object", f"secret,id={name},data={escaped}"),
        *("-O", "raw", "json:" + json.dumps(layer), str(raw)),
    )
    assert raw.read_bytes()[2 << 20 :][: 128 << 10] == bytes([PATTERN]) * (128 << 10)
    raw.unlink()


async def test_the_search_for_plaintext_can_find_some(start_qemu, vm_dir, qemu_binary):
    """On a disk that is not encrypted it does."""
    scenario = parse_scenario("about: Plain.\nimages:\n  - {size: 8M}\n", "plain")
    vm = await start_qemu(await build(scenario, vm_dir / "images", Tools.of(qemu_binary)))
    await vm.qemu_io("d0", f"write -P {PATTERN} 2M 1M")
    await vm.quit()
    assert [path.name for path in files_below(vm_dir) if holds_pattern(path)] == ["d0-0.qcow2"]


@pytest.mark.parametrize(
    ("operation", "arguments"),
    [
        ("stream", {}),
        ("stream", {"base": "@2"}),
        ("commit", {"top": "@1"}),
        ("commit", {}),
        ("commit", {"top": "@1", "base": "@2"}),
    ],
)
async def test_what_would_store_plaintext_is_refused(
    operation, arguments, start_qemu, vm_dir, qemu_binary
):
    scenario = parse_scenario(ENCRYPTED_MIDDLE, "encrypted-middle")
    built = await build(scenario, vm_dir / "images", Tools.of(qemu_binary))
    vm = await start_qemu(built)
    before = {path: path.read_bytes() for path in files_below(vm_dir / "images")}
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()

        async def work():
            async with getattr(disk, operation)(**arguments):
                pass

        with pytest.raises(UnsupportedError, match="the plaintext of the one") as caught:
            await work()
        assert caught.value.exit_code == 2
        assert caught.value.standing == "nothing was touched"
    await nothing_of_ours(vm)
    assert {path: path.read_bytes() for path in files_below(vm_dir / "images")} == before


async def test_an_encrypted_disk_gets_no_overlay_that_cannot_be(start_qemu, vm_dir, qemu_binary):
    text = "about: Encrypted.\nimages:\n  - {format: luks, size: 4M, secret: sesame}\n"
    built = await build(parse_scenario(text, "x"), vm_dir / "images", Tools.of(qemu_binary))
    vm = await start_qemu(built)
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        with pytest.raises(UnsupportedError, match="an overlay of format qed cannot be"):
            await disk.snapshot(vm_dir / "images" / "overlay.qed", format="qed")
    assert not (vm_dir / "images" / "overlay.qed").exists()


# -- storage that is read-only


@pytest.mark.scenarios("chain-3.yaml")
@pytest.mark.parametrize(
    ("operation", "layer", "arguments"),
    [
        ("commit", 2, {"top": "@1"}),
        ("commit", 2, {}),
        ("commit", 1, {"base": "@1"}),
        ("stream", 1, {"top": "@1"}),
    ],
)
async def test_read_only_storage_is_refused(
    operation, layer, arguments, scenario, start_qemu, vm_dir, qemu_binary, invariant
):
    """`read-only=on` on the storage node, where nothing can make it writable again."""
    built = await build(scenario, vm_dir / "images", Tools.of(qemu_binary))
    described = built.disks[0].active.describe(node="d0", live=True)
    found = described
    for _ in range(layer):
        found = found["backing"]
    found["file"] |= {"read-only": True, "auto-read-only": False}
    found["read-only"] = True
    extra = ["-blockdev", json.dumps(described), "-device", "virtio-blk-pci,drive=d0,id=vd0"]
    vm = await start_qemu([], extra=extra)
    before = {path: path.read_bytes() for path in files_below(vm_dir / "images")}
    async with qmpblock.connect(vm.monitor_path) as controller:
        disk = await controller.disk("vd0")

        async def work():
            async with getattr(disk, operation)(**arguments):
                pass

        with pytest.raises(UnsupportedError, match="reading only") as caught:
            await work()
        assert "auto-read-only=on" in caught.value.remedy
        assert caught.value.exit_code == 2
    await nothing_of_ours(vm)
    await invariant.verify(vm)
    await vm.quit()
    assert {path: path.read_bytes() for path in files_below(vm_dir / "images")} == before


# -- a concluded stream of somebody else's, which kills QEMU 7.2 at the next look (K7)


async def conclude_foreign_stream(vm):
    await vm.execute("block-stream", job_id="theirs", device="d0", auto_dismiss=False)
    while (await vm.execute("query-jobs"))[0]["status"] != "concluded":
        await asyncio.sleep(0.01)


@pytest.mark.scenarios("chain-2.yaml")
async def test_a_foreign_concluded_stream_is_waited_for(scenario, start_qemu, invariant):
    vm = await start_qemu(scenario)
    await conclude_foreign_stream(vm)
    async with qmpblock.connect(vm.monitor_path) as controller:
        looking = asyncio.create_task(controller.graph())
        await asyncio.sleep(0.3)
        assert looking.done() is not controller.capabilities.concluded_streams_kill
        await vm.execute("job-dismiss", id="theirs")
        assert len((await looking).device("vd0").chain.layers) == 1
    assert vm.running
    invariant.forget(vm)


@pytest.mark.scenarios("chain-2.yaml")
async def test_a_foreign_concluded_stream_that_stays_is_refused(
    scenario, start_qemu, invariant, monkeypatch
):
    monkeypatch.setattr("qmpblock.qemu.connection._DISMISSAL", 0.5)
    vm = await start_qemu(scenario)
    await conclude_foreign_stream(vm)
    async with qmpblock.connect(vm.monitor_path) as controller:
        if controller.capabilities.concluded_streams_kill:
            with pytest.raises(UnsupportedError, match="theirs has ended and nobody") as caught:
                await controller.disks()
            assert 'job-dismiss {"id": "theirs"}' in caught.value.remedy
        else:
            [disk] = await controller.disks()
            assert disk.chain.active.node.name == "d0"
    os.kill(vm.pid, 0)
    assert [job["status"] for job in await vm.execute("query-jobs")] == ["concluded"]
    await vm.execute("job-dismiss", id="theirs")
    invariant.forget(vm)


@pytest.mark.scenarios("chain-3.yaml")
@pytest.mark.parametrize("how", ["stream", "commit"])
async def test_a_bitmap_in_use_does_not_kill_qemu(how, scenario, start_qemu, vm_dir):
    """QEMU aborts where a layer goes whose dirty bitmap is exported."""
    vm = await start_qemu(scenario)
    node = "d0-1"
    await vm.execute("block-dirty-bitmap-add", node=node, name="backup", disabled=True)
    await vm.execute("nbd-server-start", addr={"type": "unix", "data": {"path": str(vm_dir / "n")}})
    await vm.execute(
        "block-export-add", type="nbd", id="backup", node_name=node, bitmaps=["backup"]
    )
    async with qmpblock.connect(vm.monitor_path, nbd=str(vm_dir / "n")) as controller:
        [disk] = await controller.disks()
        running = disk.stream() if how == "stream" else disk.commit(top="@1")
        with pytest.raises(BusyError, match="backup"):
            async with running:
                pass
    assert vm.running, vm.evidence()
    await vm.execute("block-export-del", id="backup")
    await vm.execute("nbd-server-stop")
    await vm.execute("block-dirty-bitmap-remove", node=node, name="backup")
