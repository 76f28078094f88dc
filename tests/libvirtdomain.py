"""A domain of libvirt's whose guest writes, and what libvirt and QEMU say of its disks."""

from __future__ import annotations

import re
import time
from pathlib import Path

from libvirthost import run

import qmpblock
from qmpblock.testing.images import Tools


class Domain:
    """A domain whose guest writes, and what libvirt says of it."""

    def __init__(self, host, name, qemu, *images, **options):
        self.host, self.name, self.qemu = host, name, qemu
        self.address = host.address(name)
        self.pid = host.domain(name, images[0], "qcow2", qemu, *images[1:], **options)
        self.disks = ("vda", "vdb")[: len(images)]
        self.written = {}

    def virsh(self, verb, *words):
        return self.host.virsh(verb, self.name, *words)

    def write(self, pattern, where, disk=0):
        """Have the guest write 64 KiB."""
        self._io(disk, f"write -P {pattern} {where}k 64k")
        self.written[disk, where] = pattern

    def _io(self, disk, what):
        """Do what the guest would; QEMU keeps to itself what its qemu-io says."""
        device = f"/machine/peripheral/virtio-disk{disk}/virtio-backend"
        command = f'qemu-io -d {device} "{what}"'
        assert not self.virsh("qemu-monitor-command", "--hmp", command).strip()

    def chains(self, disk="vda"):
        """Return the disk's chain as libvirt has it now, and its image at the next start."""
        found = []
        for which in ([], ["--inactive"]):
            disks = re.findall("<disk .*?</disk>", self.virsh("dumpxml", *which), re.DOTALL)
            [one] = [text for text in disks if f"<target dev='{disk}'" in text]
            found.append([Path(file).name for file in re.findall("<source file='(.*?)'", one)])
        now, later = found
        return now, later[0]

    async def layers(self, disk="vda"):
        async with qmpblock.connect(self.address) as vm:
            chain = (await vm.disk(disk)).chain
            assert await vm.jobs() == ()
            assert not any("qmpblock" in name for name in (await vm.graph()).nodes)
            return [Path(layer.file).name for layer in chain.layers]

    def ended(self):
        """See that nothing is lost in the images that libvirt would start the domain from."""
        io = Tools.of(self.qemu).io
        for (disk, where), pattern in self.written.items():
            image = self.file("vd" + "ab"[disk])
            run(io, "-r", "-f", _fmt(image), "-c", f"read -P {pattern} {where}k 64k", image)

    def file(self, disk):
        """Return the image that libvirt starts a disk from the next time."""
        listed = self.virsh("domblklist", "--inactive").split()
        return listed[listed.index(disk) + 1]

    def end(self):
        self.virsh("destroy")
        self.ended()

    def goes_on(self):
        """Have libvirt back the disks up by itself, and pull a layer of vda; see what came of it.

        The guest goes on in an overlay of libvirt's, which holds what the active layer held.
        """
        self.backs_up()
        self.virsh("snapshot-create-as", "--disk-only", "--no-metadata", "next")
        self.write(77, 15 << 10)
        chain, _ = self.chains()
        below = ("--base", Path(self.file("vda")).with_name(chain[2])) if chain[2:] else ()
        self.virsh("blockpull", "vda", *map(str, below), "--wait")
        assert self.chains() == ([chain[0], *chain[2:]], chain[0])

    def backs_up(self):
        """Have libvirt make a backup, and compare it with what the guest has."""
        self.virsh("backup-begin")
        while "None" not in self.virsh("domjobinfo"):
            time.sleep(0.05)
        assert "Completed" in self.virsh("domjobinfo", "--completed")
        img = Tools.of(self.qemu).img
        for number, disk in enumerate(self.disks):
            image = Path(self.file(disk))
            [backup] = [
                file for file in image.parent.glob(f"{image.name}.*") if file.suffix[1:].isdecimal()
            ]
            # The guest stands still, so what it has is in the files that QEMU has open.
            self._io(number, "flush")
            run(img, "compare", "-U", "-f", "qcow2", "-F", _fmt(image), backup, image)
            backup.unlink()


def _fmt(image):
    return "raw" if str(image).endswith(".raw") else "qcow2"
