"""A domain of libvirt's whose guest writes, and what libvirt and QEMU say of its disks."""

from __future__ import annotations

import re
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
        self.written = {}

    def virsh(self, verb, *words):
        return self.host.virsh(verb, self.name, *words)

    def write(self, pattern, where, disk=0):
        """Have the guest write 64 KiB; QEMU keeps to itself what its qemu-io says."""
        device = f"/machine/peripheral/virtio-disk{disk}/virtio-backend"
        command = f'qemu-io -d {device} "write -P {pattern} {where}k 64k"'
        assert not self.virsh("qemu-monitor-command", "--hmp", command).strip()
        self.written[disk, where] = pattern

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
            fmt = "raw" if image.endswith(".raw") else "qcow2"
            run(io, "-r", "-f", fmt, "-c", f"read -P {pattern} {where}k 64k", image)

    def file(self, disk):
        """Return the image that libvirt starts a disk from the next time."""
        listed = self.virsh("domblklist", "--inactive").split()
        return listed[listed.index(disk) + 1]

    def end(self):
        self.virsh("destroy")
        self.ended()
