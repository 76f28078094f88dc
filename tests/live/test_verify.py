"""Comparing closed images of every scenario, images in use, and what a running QEMU exports."""

import asyncio
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from chains import cli

import qmpblock
from qmpblock.copying.digests import take_digests, unequal
from qmpblock.copying.hostspace import verify_space
from qmpblock.copying.verify import opened, verify
from qmpblock.errors import UnsupportedError
from qmpblock.export.session import Request, exports
from qmpblock.graph.jsonname import as_name
from qmpblock.host.closedimage import closed_image
from qmpblock.testing.images import Tools, build
from qmpblock.testing.scenario import parse_scenario

pytestmark = pytest.mark.live

CHAIN = """\
about: A chain.
images:
  - {format: raw, size: 16M, content: [write 0 1M 0xaa]}
  - {content: [write 2M 1M 0xbb]}
  - {content: [write 4M 64K 0xcc]}
"""
RAW = "about: One.\nimages:\n  - {format: raw, size: 16M, content: [write 0 1M 0xaa]}\n"


@pytest.fixture(autouse=True)
def tools_of_this_qemu(qemu_binary, vm_dir, monkeypatch):
    """Have the tools of the tested QEMU in PATH, as links."""
    programs = vm_dir / "programs"
    programs.mkdir()
    for name in ("qemu-img", "qemu-io", "qemu-nbd"):
        beside = Path(qemu_binary).with_name(name)
        found = str(beside) if beside.exists() else shutil.which(name)
        (programs / name).symlink_to(found)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")


def convert(image, to, fmt="raw"):
    """Copy what a guest would see of a closed image, by qemu-img."""
    command = ["qemu-img", "convert", "-O", fmt, as_name(image.options), to]
    subprocess.run(command, check=True, capture_output=True)
    return to


def write(path, at, data, fmt="raw"):
    pattern = f"write -q -P {data} {at} 1"
    subprocess.run(["qemu-io", "-f", fmt, "-c", pattern, str(path)], check=True)


async def test_every_scenario_equals_its_copy_until_a_byte_differs(scenario, qemu_binary, vm_dir):
    built = await build(scenario, vm_dir / "images", Tools.of(qemu_binary))
    for number, disk in enumerate(built.disks):
        active = disk.active
        try:
            image = await closed_image(active.path, format=active.spec.format)
        except UnsupportedError as error:
            refused = {  # as `map IMAGE` refuses them
                "chain-no-recorded-format": "does not record the format",
                "chain-5-names": "is not a local file",
            }
            assert refused[scenario.name] in str(error)
            continue
        copy = vm_dir / f"copy-{number}.qcow2"
        if "luks" in scenario.name:
            with pytest.raises(UnsupportedError, match="is encrypted"):
                await verify(image, image)
            continue
        convert(image, copy, "qcow2")
        other = await closed_image(copy)
        for every in (False, True):
            found = await verify(image, other, all=every)
            assert found.equal, found
            assert found.sizes == (image.size, image.size)
        if not image.size:
            continue
        async with opened(image) as client, opened(other) as its:
            assert unequal(await take_digests(client), await take_digests(its)).total == 0
            last = (await client.read(image.size - 512, 512))[-1]
        write(copy, image.size - 1, last ^ 1, "qcow2")
        for every in (False, True):
            found = await verify(image, await closed_image(copy), all=every)
            assert (found.equal, found.first_difference) == (False, image.size - 1)
            assert found.differing == (1 if every else None)


@pytest.mark.parametrize("locking", ["auto", "off"])
@pytest.mark.parametrize("text", [RAW, CHAIN])
async def test_an_image_in_use_is_refused_on_either_side(
    text, locking, start_qemu, qemu_binary, vm_dir
):
    built = await build(parse_scenario(text, "one"), vm_dir / "images", Tools.of(qemu_binary))
    active = built.disks[0].active
    other = convert(await closed_image(active.path, format=active.spec.format), vm_dir / "o.raw")
    options = active.describe(node="d0", live=True)
    options["file"]["locking"] = locking
    extra = ["-blockdev", json.dumps(options), "-device", "virtio-blk-pci,drive=d0,id=vd0"]
    vm = await start_qemu([], extra=extra)
    before = active.path.read_bytes()
    formats = ("--format", active.spec.format, "--second-format", active.spec.format)
    for pair, words in (
        ((active.path, other), ("--format", active.spec.format)),
        ((other, active.path), ("--second-format", active.spec.format)),
        ((active.path, active.path), formats),
    ):
        for more in ((), ("--all",)):
            code, out, err = await cli("verify", *map(str, pair), *words, *more)
            assert (code, out) == (2, ""), err
            assert "is in use: process" in err
            assert str(vm.pid) in err
    assert active.path.read_bytes() == before
    for frozen in active.chain()[1:]:  # can be read while the VM runs
        found = await qmpblock.verify_images(
            frozen.path, frozen.path, format=frozen.spec.format, second_format=frozen.spec.format
        )
        assert found.equal


@pytest.mark.parametrize("fmt", ["raw", "qcow2", "vdi", "vmdk"])
async def test_an_image_that_another_users_vm_writes_to(fmt, eve):
    """Of whatever format: no tool is asked, whose own refusal would be another exit code."""
    if os.geteuid() != 0:
        pytest.skip("only root can run something as other users")
    vm = await eve.start(parse_scenario(RAW.replace("raw", fmt), "one"))
    path = str(vm.disks[0].active.path)
    words = ("--format", fmt, "--second-format", fmt)
    code, out, err = await cli("verify", path, path, *words)
    assert (code, out) == (2, ""), err
    assert "is in use: process" in err


@pytest.mark.scenarios("chain-3.yaml", "iothread-virtio-blk.yaml", "raw-base.yaml")
async def test_what_a_running_qemu_exports(scenario, start_qemu, qemu_binary, vm_dir, invariant):
    """Under custody (K1): a QEMU with an iothread outlives it, whatever its version is."""
    built = await build(scenario, vm_dir / "images", Tools.of(qemu_binary))
    active = built.disks[0].active
    image = await closed_image(active.path, format=active.spec.format)
    copy = convert(image, vm_dir / "copy.raw")
    vm = await start_qemu(built)
    await vm.execute("stop")  # else 7.2 has no export in an iothread whose guest boots
    async with qmpblock.connect(vm.monitor_path) as controller:
        disk = (await controller.disks())[0]
        request = Request(disk.chain.active.node.name)

        async def look(**options):
            async with exports(controller.monitor, disk.device, [request]) as [client]:
                return await verify(client, await closed_image(copy), **options)

        assert (await look()).equal
        async with exports(controller.monitor, disk.device, [request]) as [client]:
            live = await take_digests(client)
        async with opened(await closed_image(copy)) as client:
            assert unequal(live, await take_digests(client)).total == 0
        byte = copy.read_bytes()[image.size - 1]
        write(copy, image.size - 1, byte ^ 1)
        found = await look(all=True)
        assert (found.first_difference, found.differing) == (image.size - 1, 1)
        # Cancelled in the middle, it leaves nothing, and the VM lives.
        begun = asyncio.Event()
        task = asyncio.ensure_future(look(progress=lambda _: begun.set()))
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await vm.execute("query-block-exports") == []
    await vm.execute("cont")


async def test_a_copy_by_backup_is_thin_or_full_as_it_was_asked(start_qemu, qemu_binary, vm_dir):
    """Of a VM's own job: what it wrote is what verify_space says, thin and in full."""
    built = await build(parse_scenario(RAW, "one"), vm_dir / "images", Tools.of(qemu_binary))
    wanted = (await (await closed_image(built.disks[0].active.path, format="raw")).map()).data()
    vm = await start_qemu(built)
    for fmt, options, thin in (
        ("qcow2", (), True),
        ("qcow2", ("-o", "preallocation=falloc"), False),
        ("raw", (), False),  # a backup writes zeros into a raw one
    ):
        target = vm_dir / f"target-{len(list(vm_dir.iterdir()))}.{fmt}"
        create = ["qemu-img", "create", "-q", "-f", fmt, *options, str(target), "16M"]
        subprocess.run(create, check=True)
        await vm.execute(
            "blockdev-add",
            node_name="target",
            driver=fmt,
            file={"driver": "file", "filename": str(target)},
        )
        [device] = [one for one in await vm.execute("query-block") if one.get("inserted")]
        with vm.control.subscribe("BLOCK_JOB_COMPLETED") as completed:
            await vm.execute(
                "blockdev-backup",
                job_id="copy",
                device=device["inserted"]["node-name"],
                target="target",
                sync="full",
            )
            await completed.get(30)
        await vm.execute("blockdev-del", node_name="target")
        image = await closed_image(target)
        assert (await verify_space(image, "thin", wanted=wanted)).as_asked is thin
        assert (await verify_space(image, "full")).as_asked is not thin
