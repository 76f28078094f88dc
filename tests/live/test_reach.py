"""Each verb by each way to reach a VM that somebody manages: it is done, or refused.

What stands in the table of `tests/reaching.py`, which docs/managers.md shows, is asked for here by
its command. What libvirt does itself has tests of its own.
"""

import asyncio
import json
import sys

import pytest
from chains import cli
from libvirthost import make_chain, start
from proxmox import DISK, monitor, started
from reaching import BY_LIBVIRT, INCUS, LIBVIRT, PVE, REFUSED, ROWS

from qmpblock.testing.images import Tools, build
from qmpblock.testing.scenario import parse_scenario

pytestmark = pytest.mark.live

CHAIN = """\
about: A chain of two.
images:
  - {size: 8M, content: [write 0 1M 0xaa]}
  - {content: [write 2M 64K 0xbb]}
"""
RAW = "about: A raw disk.\nimages:\n  - {format: raw, size: 8M, content: [write 0 1M 0xaa]}\n"


@pytest.fixture
def reached(request, start_qemu, vm_dir, qemu_binary):
    """Return what starts a VM in a manager's shape: the way, its address, its disk, the image."""

    async def by_pve(text):
        _, built = await started(start_qemu, vm_dir, qemu_binary, text, guest=True)
        return PVE, monitor(vm_dir), DISK, built.disks[0].active.path

    async def by_incus(text):
        built = await build(parse_scenario(text, "x"), vm_dir / "images", Tools.of(qemu_binary))
        node = built.disks[0].active.describe(node="incus_root", live=True)
        extra = ["-name", "web", "-blockdev", json.dumps(node)]
        extra += ["-device", "virtio-blk-pci,drive=incus_root,id=dev-incus_root"]
        vm = await start_qemu([], extra=extra)
        return INCUS, str(vm.monitor_path), "dev-incus_root", built.disks[0].active.path

    return {"pve": by_pve, "incus": by_incus}[request.param]


async def asked(words):
    """Run a command; a watch is interrupted when it has been one for a while."""
    if "--watch" not in words:
        return await cli(*words)
    begun = ("timeout", "--signal=INT", "3", sys.executable, "-m", "qmpblock", *words)
    process = await asyncio.create_subprocess_exec(
        *begun, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, err = await process.communicate()
    # 130 is what it ends with itself, 124 what timeout makes of that.
    return {124: 0, 130: 0}.get(process.returncode, process.returncode), out.decode(), err.decode()


async def ask_for_each(way, address, disk, directory):
    """Ask for each verb; what is refused has to say that nothing was touched, and leave no file."""
    given = {"vm": address, "disk": disk, "place": directory}
    for name, wanted in (("ahead", "ahead: 2M"), ("thin", "allocation: thin")):
        given[name] = directory / name
        disks = f"[{{disk: {disk}, {wanted}}}]"
        given[name].write_text(f"vms:\n- {{address: '{address}', disks: {disks}}}\n")
    before = {path.name for path in directory.glob("*.qcow2")}
    wrong = []
    for row in ROWS:
        cell = row.cells[way]
        if not row.words or cell.done == BY_LIBVIRT:
            continue
        code, out, err = await asked([word.format(**given) for word in row.words.split()])
        refused = bool(code) and "nothing was touched" in out + err
        if refused != (cell.done == REFUSED) or refused != bool(code):
            wrong.append((row.name, str(cell), code, out[-300:], err[-600:]))
    assert not wrong
    assert {path.name for path in directory.glob("*.qcow2")} == before
    assert not (directory / "backups").exists()


async def test_each_verb_by_libvirt(libvirt, vm_dir, qemu_binary):
    shown = start(libvirt, "reached", make_chain(vm_dir, qemu_binary), qemu_binary)
    before = shown()
    await ask_for_each(LIBVIRT, libvirt.address("reached"), "vda", vm_dir)
    assert shown() == before
    libvirt.virsh("destroy", "reached")


@pytest.mark.parametrize("reached", ["pve", "incus"], indirect=True)
async def test_each_verb(reached, vm_dir, invariant):
    way, address, disk, _ = await reached(CHAIN)
    await ask_for_each(way, address, disk, vm_dir)


@pytest.mark.parametrize("reached", ["pve", "incus"], indirect=True)
async def test_host_space(reached):
    """Of a raw image, which every manager knows as the same one afterwards."""
    _, address, disk, file = await reached(RAW)
    assert (await cli("allocate", address, disk, "--full"))[0] == 0
    assert file.stat().st_blocks * 512 >= 8 << 20
