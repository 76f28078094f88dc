"""A Linux that keeps a log in a file system goes over while it writes: nothing of it is lost."""

import asyncio
import subprocess

import pytest
from migrating import migrated

from qmpblock.testing.images import Tools
from qmpblock.testing.linux import LinuxImage, LinuxUnavailableError

pytestmark = pytest.mark.live

WRITER = """\
n=0
while [ ! -e /tmp/enough ]; do
  n=$((n + 1))
  echo $n >>/mnt/log
  dd if=/dev/urandom of=/mnt/noise bs=64k count=4 seek=$((n % 50)) conv=notrunc 2>/dev/null
  sync
  echo $n >/tmp/synced
done
touch /tmp/ended
"""


def image_at(path, tools):
    subprocess.run([tools.img, "create", "-q", "-f", "qcow2", path, "64M"], check=True)
    return {"driver": "qcow2", "node_name": "d0", "file": {"driver": "file", "filename": str(path)}}


async def test_a_file_system_and_a_growing_log(vm_dir, qemu_binary):
    try:
        image = await LinuxImage.prepare(qemu_binary)
    except LinuxUnavailableError as error:
        pytest.skip(f"no Linux guest: {error}")
    tools = Tools.of(qemu_binary)
    here = image_at(vm_dir / "here.qcow2", tools)
    there = vm_dir / "there.qcow2"
    image_at(there, tools)
    disk = f"driver=qcow2,node-name=d0,discard=unmap,file.driver=file,file.filename={there}"
    plugged = ("-blockdev", disk, "-device", "virtio-blk-pci,id=v0,drive=d0,bus=port0")
    async with image.restore() as linux, image.waiting(plugged) as arrived:
        await linux.vm.execute("blockdev-add", **here)
        path = await linux.attach("d0", id="v0")
        await linux.check(f"mke2fs {path} && mount {path} /mnt")
        await linux.check(
            f"cat >/tmp/writer <<'END'\n{WRITER}END\nsh /tmp/writer >/dev/null 2>&1 &"
        )
        while (await linux.run("test -s /tmp/synced"))[0]:
            await asyncio.sleep(0.05)
        synced = int(await linux.check("cat /tmp/synced"))
        result = await migrated(linux.vm, arrived.vm)
        print(f"{result.seconds:.2f} s, downtime {result.downtime * 1e3:.0f} ms")
        gone_on = int(await arrived.check("cat /tmp/synced"))
        assert gone_on >= synced
        while int(await arrived.check("cat /tmp/synced")) < gone_on + 5:
            await asyncio.sleep(0.05)
        await arrived.check("touch /tmp/enough; while [ ! -e /tmp/ended ]; do sleep 1; done")
        lines = int(await arrived.check("cat /tmp/synced"))
        await arrived.check("umount /mnt && mount -o ro /dev/vda /mnt")
        assert await arrived.check("md5sum </mnt/log") == await arrived.check(
            f"seq 1 {lines} | md5sum"
        )
        await arrived.check("umount /mnt")
        assert "I/O error" not in await arrived.check("dmesg")
    raw = vm_dir / "raw"
    await tools.run(tools.img, "convert", "-f", "qcow2", "-O", "raw", str(there), str(raw))
    print(await tools.run("e2fsck", "-f", "-n", str(raw)))
