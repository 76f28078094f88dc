"""A Linux that keeps a log in a file system goes over while it writes: what tests of it share."""

import asyncio
import subprocess

from migrating import migrated

from qmpblock.testing.images import Tools

WRITER = """\
n=0
while [ ! -e /tmp/enough ]; do
  n=$((n + 1))
  echo $n >>/mnt/log
  dd if=/dev/urandom of=/mnt/noise bs=64k count=4 seek=$((n % 50)) conv=notrunc 2>/dev/null
  sync
  echo $n >/tmp/next
  mv /tmp/next /tmp/synced  # whoever reads it finds a number, whenever
done
touch /tmp/ended
"""


async def log_goes_over(here, there, directory, qemu, extra=()):
    """Have a Linux migrate as it writes, and see that nothing of its log is lost.

    :param here: the LinuxImage that it is restored from; `there`: that of the destination's QEMU.
    :param extra: options of the destination.
    """
    tools = Tools.of(qemu)
    source, target = directory / "here.qcow2", directory / "there.qcow2"
    for path in (source, target):
        subprocess.run([tools.img, "create", "-q", "-f", "qcow2", path, "64M"], check=True)
    disk = f"driver=qcow2,node-name=d0,discard=unmap,file.driver=file,file.filename={target}"
    plugged = ("-blockdev", disk, "-device", "virtio-blk-pci,id=v0,drive=d0,bus=port0")
    async with here.restore() as linux, there.waiting((*plugged, *extra)) as arrived:
        file = {"driver": "file", "filename": str(source)}
        await linux.vm.execute("blockdev-add", driver="qcow2", node_name="d0", file=file)
        path = await linux.attach("d0", id="v0")
        await linux.check(f"mke2fs {path} && mount {path} /mnt")
        await linux.check(
            f"cat >/tmp/writer <<'END'\n{WRITER}END\nsh /tmp/writer >/dev/null 2>&1 &"
        )
        while (await linux.run("test -s /tmp/synced"))[0]:
            await asyncio.sleep(0.05)
        synced = int(await linux.check("cat /tmp/synced"))
        result = await migrated(linux.vm, arrived.vm)
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
    raw = directory / "raw"
    await tools.run(tools.img, "convert", "-f", "qcow2", "-O", "raw", str(target), str(raw))
    await tools.run("e2fsck", "-f", "-n", str(raw))
    print(f"{result.seconds:.2f} s, downtime {result.downtime * 1e3:.0f} ms, {lines} lines")
