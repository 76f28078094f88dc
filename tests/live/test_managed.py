"""VMs that somebody manages: what he would not be told of is refused, all else works.

The VMs are ours, with the names that libvirt, Proxmox VE and Incus give; libvirt's own words
about them (domblklist, the next start from the old image) were looked at by hand.
"""

import json

import pytest
from chains import cli
from proxmox import arguments, monitor

import qmpblock
from qmpblock.errors import UnsupportedError
from qmpblock.policy.file import load_policy
from qmpblock.policy.run import apply, plan
from qmpblock.testing.images import Tools, build
from qmpblock.testing.scenario import parse_scenario

pytestmark = pytest.mark.live

CHAIN = """\
about: A chain of three.
images:
  - {size: 8M, content: [write 0 1M 0xaa]}
  - {content: [write 1M 64K 0xbb]}
  - {content: [write 2M 64K 0xcc]}
"""
RAW = "about: A raw disk.\nimages:\n  - {format: raw, size: 8M, content: [write 0 1M 0xaa]}\n"
MANAGERS = {
    "libvirt": ("libvirt-1-format", "virtio-disk0", "libvirt", "virsh "),
    "proxmox": ("drive-scsi0", "scsi0", "Proxmox VE", "qm "),
    "incus": ("incus_root", "dev-incus_root", "Incus", "incus "),
}


@pytest.fixture
def managed(start_qemu, vm_dir, qemu_binary):
    """Return what starts a VM as that manager would."""

    async def start(name, text=CHAIN):
        built = await build(parse_scenario(text, "x"), vm_dir / "images", Tools.of(qemu_binary))
        root, device, _, _ = MANAGERS[name]
        extra = ["-name", "guest=web,debug-threads=on"]
        node = built.disks[0].active.describe(node=root, live=True)
        if name == "proxmox":
            # A throttle filter on top, and a hash for what is below (31 characters there).
            node = built.disks[0].active.describe(node="f0123", live=True)
            extra += ["-object", "throttle-group,id=throttle-drive-scsi0"]
            node = {
                "driver": "throttle",
                "node-name": root,
                "throttle-group": "throttle-drive-scsi0",
                "file": node,
            }
        extra += ["-blockdev", json.dumps(node)]
        extra += ["-device", f"virtio-blk-pci,drive={root},id={device}"]
        return await start_qemu([], extra=extra), built, device

    return start


def verbs(disk, directory):
    async def run(job):
        async with job:
            pass

    yield "snapshot", lambda: disk.snapshot(directory / "overlay.qcow2")
    yield "commit", lambda: run(disk.commit())
    yield "commit of a middle layer", lambda: run(disk.commit(top="@1"))
    yield "stream", lambda: run(disk.stream())
    yield "stream of a part", lambda: run(disk.stream(base="@2"))
    yield "independent", lambda: disk.allocate(independent=True)
    yield "full", lambda: disk.allocate(full=True)
    yield "point", lambda: run(disk.point_in_time())


@pytest.mark.parametrize("name", MANAGERS)
async def test_what_the_manager_would_not_know_is_refused(name, managed, vm_dir):
    vm, _, device = await managed(name)
    async with qmpblock.connect(vm.monitor_path) as controller:
        disk = await controller.disk(device)
        before = disk.chain.shape
        for verb, make in verbs(disk, vm_dir):
            with pytest.raises(UnsupportedError) as caught:
                await make()
            assert f"managed by {MANAGERS[name][2]}" in caught.value.message, verb
            words = (MANAGERS[name][3], "no way", "vzdump ")
            assert any(one in caught.value.remedy for one in words)
            assert caught.value.standing == "nothing was touched"
            assert caught.value.exit_code == 2
        with pytest.raises(
            UnsupportedError, match="that dirty bitmaps stay in the image"
        ) as caught:
            async with controller.backup(vm_dir / "backups", [disk]):
                pass
        assert caught.value.standing == "nothing was touched"
        await disk.refresh()
        assert disk.chain.shape == before
        assert (await disk.map()).not_in_active()
        await disk.allocate()  # thin: no name and no image changes
        assert not (await disk.map()).not_in_active()
        assert len(await disk.layers()) == 3
        assert await controller.jobs() == ()
        assert await controller.recover() == []
    assert not (vm_dir / "overlay.qcow2").exists()
    assert not (vm_dir / "backups").exists()


async def test_raw_is_reserved_under_a_manager(managed):
    vm, built, device = await managed("libvirt", RAW)
    async with qmpblock.connect(vm.monitor_path) as controller:
        disk = await controller.disk(device)
        await disk.allocate(full=True)
        await disk.make_room(1 << 20)
    assert built.disks[0].active.path.stat().st_blocks * 512 >= 8 << 20


async def test_nothing_to_do_is_not_refused(managed):
    vm, _, device = await managed("libvirt", RAW)
    async with qmpblock.connect(vm.monitor_path) as controller:
        disk = await controller.disk(device)
        async with disk.stream() as job:
            pass
        assert job.outcome.changed is False
        await disk.allocate(independent=True)


async def test_who_knows_better(managed, vm_dir, invariant):
    vm, built, device = await managed("libvirt")
    overlay = vm_dir / "images" / "overlay.qcow2"
    code, _, err = await cli("snapshot", vm.monitor_path, f"{device}={overlay}")
    assert code == 2
    assert "the VM goes on in an overlay: started again, it would be from the old image" in err
    assert "virsh snapshot-create-as web --disk-only" in err
    assert not overlay.exists()
    for words in (
        ("snapshot", vm.monitor_path, f"{device}={overlay}"),
        ("commit", vm.monitor_path, device, "--base", "@1"),
        ("stream", vm.monitor_path, device, "--base", "@2"),
        ("allocate", vm.monitor_path, device, "--full"),
        ("allocate", vm.monitor_path, device, "--independent"),
    ):
        code, _, err = await cli(*words, "--unmanaged")
        assert code == 0, err
    async with qmpblock.connect(vm.monitor_path, unmanaged=True) as controller:
        disk = await controller.disk(device)
        assert [layer.file for layer in disk.chain.layers] == [str(built.disks[0].active.path)]
    invariant.forget(vm)


#: Of Incus: one disk for each bus. The node's name is a hash where it were longer than QEMU's are.
LONG = "shared/data-of-all-of-us"
INCUS = {
    "root": ("incus_root", "dev-incus_root"),
    "my-data": ("incus_my--data", "dev-incus_my--data"),
    LONG: ("incus_AbcdefghijkLmnopqrstuvwxY", "dev-incus_shared-data--of--all--of--us"),
}


def incuss_disks(file):
    """Return the options that Incus gives its disks: one for each kind of bus that they have."""
    buses = iter(
        (
            "scsi-hd,device_id=incus_root,serial=incus_root,bus=qemu_scsi.0,channel=0,lun=1",
            "virtio-blk-pci",
            "nvme,serial=incus_x",
        )
    )
    yield from ("-device", "virtio-scsi-pci,id=qemu_scsi")
    for name, (node, device) in INCUS.items():
        image = {"driver": "file", "filename": file(name), "node-name": node, "locking": "off"}
        cache = {"direct": False, "no-flush": False}
        yield from ("-blockdev", json.dumps({**image, "discard": "unmap", "cache": cache}))
        yield from ("-device", f"{next(buses)},id={device},drive={node}")


def proxmoxs_disks(file):
    """Return the options that Proxmox VE gives its: guest disks, a CD, and the firmware's."""
    yield from ("-device", "virtio-scsi-pci,id=scsihw0", "-device", "ahci,id=ahci0")
    places = {
        "scsi1": "scsi-hd,bus=scsihw0.0,channel=0,scsi-id=0,lun=1,device_id=drive-scsi1",
        "virtio0": "virtio-blk-pci",
        "sata2": "ide-hd,bus=ahci0.2",
        "ide2": "ide-cd,bus=ide.1,unit=0",
        "efidisk0": "",
    }
    for number, (name, device) in enumerate(places.items()):
        yield from ("-object", f"throttle-group,id=throttle-drive-{name}")
        yield "-blockdev"
        image = {"driver": "file", "filename": file(name), "node-name": f"e0{number}"}
        node = {"driver": "raw", "node-name": f"f0{number}", "file": image}
        top = {"driver": "throttle", "node-name": f"drive-{name}", "file": node}
        yield json.dumps({**top, "throttle-group": f"throttle-drive-{name}"})
        if device:
            yield from ("-device", f"{device},drive=drive-{name},id={name}")
    firmware = {"driver": "file", "filename": file("firmware")}
    firmware = {"driver": "raw", "node-name": "pflash0", "read-only": True, "file": firmware}
    yield from ("-blockdev", json.dumps(firmware))
    yield from ("-machine", "pflash0=pflash0,pflash1=drive-efidisk0")


NAMES = {
    "incus": (incuss_disks, list(INCUS)),
    "proxmox": (proxmoxs_disks, ["scsi1", "virtio0", "sata2", "ide2", "efidisk0"]),
}


@pytest.mark.parametrize("name", NAMES)
async def test_a_disk_goes_by_its_managers_name(name, start_qemu, vm_dir):
    """Each leads to its own image, which is as big as no other."""
    disks, names = NAMES[name]
    sizes = {each: (number + 1) * 64 << 10 for number, each in enumerate([*names, "firmware"])}

    def file(disk):
        path = vm_dir / f"{disk.replace('/', '_')}.raw"
        with path.open("wb") as made:
            made.truncate(sizes[disk])
        return str(path)

    extra = [*(arguments(vm_dir) if name == "proxmox" else ("-name", "web")), *disks(file)]
    vm = await start_qemu([], extra=extra)
    address = monitor(vm_dir) if name == "proxmox" else vm.monitor_path
    for disk in names:
        code, out, err = await cli("map", address, disk, "--totals", "--json")
        assert code == 0, err
        assert json.loads(out)["size"] == sizes[disk]
    code, _, err = await cli("map", address, "nosuch")
    assert code == 2
    assert f"\n    {names[-1]}: " in err


@pytest.mark.parametrize(
    ("wanted", "refused"),
    [
        ("allocation: thin", False),
        ("allocation: full", True),
        ("backing: independent", True),
    ],
)
async def test_policies(wanted, refused, managed, vm_dir, invariant):
    vm, _, device = await managed("libvirt")
    invariant.forget(vm)
    policy = vm_dir / "policy.yaml"
    policy.write_text(
        f"vms:\n- address: {vm.monitor_path}\n  disks:\n  - {{disk: {device}, {wanted}}}\n"
    )
    [planned] = await plan(load_policy(str(policy)))
    [done] = await apply(load_policy(str(policy)))
    for one in (planned, done):
        assert (one.error is not None) is refused
        if one.error is not None:
            assert "managed by libvirt" in one.error.message
    code, _, err = await cli("apply", str(policy), "--unmanaged")
    assert code == 0, err
