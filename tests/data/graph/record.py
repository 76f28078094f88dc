"""Record what one QEMU says about a block graph that has a bit of everything.

    python tests/data/graph/record.py QEMU_BINARY OUT.json

The recordings feed tests/graph/test_model.py; record again when a new QEMU is to be supported.
"""

import asyncio
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from qmpblock.qemu.monitor import Monitor

COMMANDS = {
    "block": ("query-block", None),
    "nodes": ("query-named-block-nodes", {"flat": True}),
    "stats": ("query-blockstats", None),
    "jobs": ("query-jobs", None),
    "exports": ("query-block-exports", None),
    "debug_graph": ("x-debug-query-block-graph", None),
}


def image(*arguments):
    subprocess.run(["qemu-img", "create", "-q", *arguments], check=True)


async def record(binary, folder):
    image("-f", "raw", "base.raw", "8M")
    image("-f", "qcow2", "-F", "raw", "-b", "base.raw", "middle.qcow2")
    image("-f", "qcow2", "-F", "qcow2", "-b", "middle.qcow2", "active.qcow2")
    image("-f", "qcow2", "-o", "data_file=data.raw", "withdata.qcow2", "4M")
    image("-f", "raw", "legacy.raw", "4M")
    image("-f", "qcow2", "ide.qcow2", "4M")
    image("-f", "raw", "other.raw", "4M")
    image("-f", "qcow2", "-F", "raw", "-b", "other.raw", "nvme.qcow2", "4M")
    image("-f", "raw", "target.raw", "4M")
    image("-f", "qcow2", "target.qcow2", "4M")
    command = f"""{binary} -nodefaults -no-user-config -display none -accel tcg -S
        -qmp unix:{folder}/q,server=on,wait=off
        -object throttle-group,id=tg,x-bps-total=1000000000 -object iothread,id=io0
        -blockdev driver=qcow2,node-name=d0,file.driver=file,file.filename=active.qcow2
        -blockdev driver=throttle,node-name=thr,file=d0,throttle-group=tg
        -blockdev driver=copy-on-read,node-name=cor,file=thr
        -device virtio-blk-pci,drive=cor,id=vd0
        -blockdev driver=qcow2,node-name=df,file.driver=file,file.filename=withdata.qcow2
        -device virtio-blk-pci,drive=df,iothread=io0
        -device virtio-scsi-pci,id=scsi0
        -drive if=none,id=drv1,file=legacy.raw,format=raw -device scsi-hd,drive=drv1,id=sd0
        -drive if=ide,file=ide.qcow2,format=qcow2,snapshot=off
        -blockdev driver=qcow2,node-name=nv,file.driver=file,file.filename=nvme.qcow2
        -device nvme,serial=x,drive=nv,id=nv0
        -drive if=none,id=cd0,media=cdrom -device scsi-cd,id=cdx,drive=cd0
        -drive if=none,id=unused"""
    process = subprocess.Popen(command.split())
    try:
        await asyncio.sleep(2)  # no matter here how long it takes
        async with await Monitor.connect(f"{folder}/q") as monitor:

            async def replies():
                return {k: await monitor.execute(c, a) for k, (c, a) in COMMANDS.items()}

            quiet = await replies()
            for name, file, fmt in (("t1", "target.raw", "raw"), ("t2", "target.qcow2", "qcow2")):
                await monitor.execute(
                    "blockdev-add",
                    {
                        "driver": fmt,
                        "node-name": name,
                        "file": {"driver": "file", "filename": file},
                    },
                )
            slow = {"sync": "full", "speed": 1, "auto-dismiss": False}
            await monitor.execute(
                "blockdev-mirror", {"job-id": "m", "device": "drv1", "target": "t1", **slow}
            )
            await monitor.execute(
                "blockdev-backup", {"job-id": "b", "device": "df", "target": "t2", **slow}
            )
            await monitor.execute(
                "block-commit",
                {
                    "job-id": "c",
                    "device": "cor",
                    "top-node": "d0",
                    "speed": 1,
                    "auto-dismiss": False,
                },
            )
            return {"version": monitor.version, "quiet": quiet, "jobs": await replies()}
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    out = Path(sys.argv[2]).resolve()
    with tempfile.TemporaryDirectory() as folder:
        import os

        os.chdir(folder)
        result = asyncio.run(record(sys.argv[1], folder))
        out.write_text(json.dumps(result, separators=(",", ":")).replace(folder, "/vm") + "\n")
