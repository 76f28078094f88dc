"""Images that QEMU was given as descriptors (/dev/fdset/N), as Incus gives all of its own.

Which file that is, QEMU's descriptors tell; so all that needs a file on this host works there.
"""

import json
import os
import subprocess

import pytest
from chains import cli

import qmpblock
from qmpblock.testing.images import Tools

pytestmark = pytest.mark.live

MIB = 1 << 20
SIZE = 16 * MIB


@pytest.fixture
def given(start_qemu, invariant, vm_dir, qemu_binary):
    """Return what starts a VM whose image, 1 MiB of 0x07 at 1 MiB, is a set of descriptors."""
    tools = Tools.of(qemu_binary)

    async def start(fmt):
        image = vm_dir / "store" / f"disk.{fmt}"
        image.parent.mkdir()
        await tools.run(tools.img, "create", "-q", "-f", fmt, str(image), str(SIZE))
        await tools.run(tools.io, "-f", fmt, "-c", "write -P 7 1M 1M", str(image))
        qemu = vm_dir / "started"
        qemu.write_text(f'#!/bin/sh\nexec 7<>{image} 8<{image}\nexec {qemu_binary} "$@"\n')
        qemu.chmod(0o755)
        node = {"driver": "file", "node-name": "d0-file", "filename": "/dev/fdset/3"}
        vm = await start_qemu(
            [],
            qemu=str(qemu),
            extra=[
                *("-add-fd", "fd=7,set=3", "-add-fd", "fd=8,set=3"),
                *("-blockdev", json.dumps({**node, "discard": "unmap"})),
                *("-blockdev", f"{fmt},node-name=d0,file=d0-file,discard=unmap"),
                *("-device", "virtio-blk-pci,drive=d0,id=vd0"),
            ],
        )
        return vm, image

    return start


def blocks(image):
    return image.stat().st_blocks * 512


@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
async def test_host_space_for_all_of_it(fmt, given):
    vm, image = await given(fmt)
    code, out, err = await cli("allocate", vm.monitor_path, "vd0", "--full", "--json")
    assert code == 0, err
    assert json.loads(out)["reserved"] >= SIZE - 2 * MIB
    assert blocks(image) >= SIZE


@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
async def test_room_ahead_of_the_guest(fmt, given):
    vm, image = await given(fmt)
    async with qmpblock.connect(vm.monitor_path) as controller:
        before = blocks(image)
        made = await (await controller.disk("vd0")).make_room(4 * MIB)
        assert made.file == str(image)
        assert made.room >= 4 * MIB
        assert blocks(image) - before == made.reserved > 0


@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
async def test_a_copy_and_its_proof(fmt, given, vm_dir):
    vm, image = await given(fmt)
    copy = vm_dir / "copy"
    code, _, err = await cli("copy", vm.monitor_path, "vd0", str(copy), "--verify")
    assert code == 0, err
    done = subprocess.run(
        ["qemu-io", "-r", "-f", fmt, "-c", "read -P 7 1M 1M", copy], capture_output=True, text=True
    )
    assert "failed" not in done.stdout, done.stdout
    assert sorted(os.listdir(image.parent)) == [image.name]
