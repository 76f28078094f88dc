"""Backups of the machines that people have: of UEFI, encrypted, of VMs that have migrated."""

from pathlib import Path

import pytest
from chains import cli
from fleecing import ran
from migrating import machine, migrated, stressed

import qmpblock
from qmpblock.testing.images import Tools, build
from qmpblock.testing.scenario import parse_scenario

pytestmark = pytest.mark.live

TWO = """
about: Two disks of one size.
disks:
  - images: [{size: 16M, content: [write 0 6M 0xaa]}]
  - images: [{size: 16M, content: [write 0 6M 0xbb]}]
"""

LUKS = "{encrypt.format: luks, encrypt.iter-time: 10}"
QCOW2_KEY = "encrypt.format=luks,encrypt.key-secret=key"
ENCRYPTED = {
    "qcow2": f"""
about: An encrypted image over a plain one.
images: [{{size: 2M}}, {{size: 2M, secret: sesame, options: {LUKS}, content: [write 0 1M 0xaa]}}]
""",
    "luks": """
about: An encrypted one.
images: [{format: luks, size: 2M, secret: sesame, options: {iter-time: 10}}]
""",
}


@pytest.fixture
def begin(start_qemu, vm_dir, qemu_binary, invariant):
    """Start a VM on the images of a scenario, or again on those that there are."""
    built = []

    async def started(scenario=None, **options):
        if scenario is not None:
            tools = Tools.of(qemu_binary)
            built[:] = [await build(parse_scenario(scenario, "d"), vm_dir / "images", tools)]
        vm = await start_qemu(built[0], **options)
        invariant.forget(vm)  # bitmaps stay, and what is done to it here is beyond description
        return vm

    return started


async def backed_up(vm, place):
    """Back up all disks that a VM writes to; return what its point file says, and the warnings."""
    async with qmpblock.connect(vm.monitor_path) as controller:
        disks = [one for one in await controller.disks() if not one.chain.active.node.read_only]
        async with controller.backup(place, disks) as job:
            pass
    return job.result.point, job.result.warnings


async def held(place, point):
    """See that a backup holds what the closed images do, each read by qemu-img alone."""
    for one in point.disks:
        source = Path(one.source)
        code, out = await ran(
            *("qemu-img", "compare", "-f", one.format, "-F", "qcow2", source, place / one.file)
        )
        assert code == 0, (one, out)


async def test_a_vm_that_has_migrated_goes_on(begin, start_destination, vm_dir, invariant):
    """Its bitmaps go along: what was written at both ends is in the next one, and no more."""
    source, place = await stressed(await begin(machine(2), guest=True), 100), vm_dir / "b"
    first, _ = await backed_up(source, place)
    destination = await start_destination(source)
    result = await migrated(source, destination)
    assert {one.disk for one in result.bitmaps} == {"vd0", "vd1"}
    guest = await destination.attach_guest()
    for number in (0, 1):
        await guest.stop_stress(number)
    point, warnings = await backed_up(destination, place)
    assert warnings == ()
    assert [one.parent for one in point.disks] == [one.file for one in first.disks]
    await destination.quit()
    await held(place, point)


CHAIN = """
about: A disk over a base.
images: [{size: 64M, content: [write 0 6M 0xaa]}, {content: [write 1M 1M 0xbb]}]
"""


async def test_a_chain_that_has_migrated_into_one_image(begin, start_destination, vm_dir):
    """It lies on nothing now; and nobody but QEMU can have done that."""
    source, place = await stressed(await begin(CHAIN, guest=True), 100), vm_dir / "b"
    first, _ = await backed_up(source, place)
    assert len(first.disks[0].lower) == 1
    destination = await start_destination(source)
    await migrated(source, destination)
    guest = await destination.attach_guest()
    await guest.stop_stress(0)
    point, warnings = await backed_up(destination, place)
    assert warnings == ()
    assert [one.parent for one in point.disks] == [one.file for one in first.disks]
    assert point.disks[0].lower == ()
    await destination.quit()
    await held(place, point)


async def test_images_that_changed_places(begin, vm_dir):
    """Each has a bitmap of the last backup, and what it tells is of the other disk."""
    vm, place = await begin(TWO), vm_dir / "b"
    await backed_up(vm, place)
    await vm.qemu_io("d0", "write -P 1 1M 64k")
    await vm.quit()
    one, other = (vm_dir / "images" / f"d{n}-0.qcow2" for n in (0, 1))
    for source, target in ((one, vm_dir / "x"), (other, one), (vm_dir / "x", other)):
        source.rename(target)
    vm = await begin()
    point, warnings = await backed_up(vm, place)
    assert [one.kind for one in point.disks] == ["full", "full"]
    assert len(warnings) == 2
    await vm.quit()
    await held(place, point)


async def test_a_uefi_vm(begin, vm_dir):
    """Its variables, too; where no copy can be made of these, it is said of what one can be."""
    code, variables = vm_dir / "code.fd", vm_dir / "vars.fd"
    for file in (code, variables):
        file.write_bytes(b"\xff" * (1 << 20))
    flash = "if=pflash,format=raw,unit={},file={}"
    drives = (flash.format(0, f"{code},readonly=on"), flash.format(1, variables))
    extra = ["-machine", "q35", "-S", *(w for drive in drives for w in ("-drive", drive))]
    vm, place = await begin(TWO, extra=extra), vm_dir / "b"
    async with qmpblock.connect(vm.monitor_path) as controller:
        holds = not controller.capabilities.jobs_misread_views
    if not holds:
        foreseen = await cli("backup", vm.monitor_path, place, "--dry-run")
        code, _, err = await cli("backup", vm.monitor_path, place)
        assert (code, place.exists()) == (2, False)
        assert foreseen == (2, "", err)
        assert "pflash1 is a cfi.pflash01" in err
        others = f"qmpblock backup unix:{vm.monitor_path} {place} --disk vd0 --disk vd1"
        assert f"back up the others alone: {others}" in err
        return
    await backed_up(vm, place)
    point, _ = await backed_up(vm, place)
    assert [(one.disk, one.kind) for one in point.disks] == [
        (name, "incremental") for name in ("pflash1", "vd0", "vd1")
    ]
    await vm.quit()
    await held(place, point)


@pytest.mark.parametrize("fmt", ENCRYPTED)
async def test_an_encrypted_disk(fmt, begin, vm_dir):
    """Nothing of it lies in the directory in the clear; an increment is one; its key opens all."""
    vm, place = await begin(ENCRYPTED[fmt]), vm_dir / "b"
    made = []
    for byte in (0xA5, 0x5A):
        await vm.qemu_io("d0", f"write -P {byte} 1M 300k")
        async with qmpblock.connect(vm.monitor_path) as controller:
            [planned] = (await controller.plan_backup(place, await controller.disks())).disks
        point, warnings = await backed_up(vm, place)
        made += point.disks
        assert warnings == ()
        assert (planned.kind, planned.reason) == (made[-1].kind, made[-1].reason)
        taken = (place / made[-1].file).stat().st_blocks * 512
        assert taken <= planned.room.needed, planned
    assert [(one.kind, one.encrypted) for one in made] == [("full", True), ("incremental", True)]
    for file in place.iterdir():
        data = file.read_bytes()
        assert not any(bytes([byte]) * 512 in data for byte in (0xAA, 0xA5, 0x5A)), file
    code, _, err = await cli("restore", place, vm_dir / "restored")
    assert (code, "is encrypted with the key of its disk" in err) == (2, True)
    await vm.quit()
    above, below = (
        f"driver=qcow2,{QCOW2_KEY},file.filename={place / one.file}" for one in reversed(made)
    )
    below = ",".join(f"backing.{option}" for option in below.split(","))
    options = QCOW2_KEY if fmt == "qcow2" else "key-secret=key"
    source = f"driver={fmt},{options},file.filename={made[1].source}"
    key = ("--object", "secret,id=key,data=sesame")
    code, out = await ran("qemu-img", "compare", *key, "--image-opts", source, f"{above},{below}")
    assert code == 0, out
