"""K12: pflash, floppy and SD card wait for their disk in QEMU's main loop.

A pivot that is pending would hold what they have asked for, and nobody could finalize it: so
they are given none. What QEMU does is shown too, without us, by I/O from outside (qtest).
"""

import asyncio
import json
import subprocess
from contextlib import asynccontextmanager

import pytest

import qmpblock
from qmpblock.errors import UnsupportedError
from qmpblock.ranges import Ranges
from qmpblock.testing.qemu import write_idle_rom

pytestmark = pytest.mark.live

SIZES = {"pflash": 1 << 20, "floppy": 1474560, "sd": 8 << 20}
#: In the second flash, which ends where the first one, of 64 KiB, begins.
FLASH = (4 << 30) - (64 << 10) - (1 << 20) + 4096
PROGRAM, READ = 0x40, 0xFF


def image(path, size, backing=None):
    command = ["qemu-img", "create", "-q", "-f", "qcow2"]
    if backing is not None:
        command += ["-b", str(backing), "-F", "qcow2"]
    subprocess.run([*command, str(path), str(size)], check=True)


async def start(start_qemu, vm_dir, kind):
    """Start a VM with a two-layer disk behind such a device, and access to its registers."""
    base, active = vm_dir / "base.qcow2", vm_dir / "active.qcow2"
    await asyncio.to_thread(image, base, SIZES[kind])
    await asyncio.to_thread(image, active, SIZES[kind], base)
    write = ["qemu-io", "-f", "qcow2", "-c", "write -q -P 0x11 0 64k", str(base)]
    await asyncio.to_thread(subprocess.run, write, check=True)
    node = {
        "driver": "qcow2",
        "node-name": "d0",
        "file": {"driver": "file", "node-name": "d0-file", "filename": str(active)},
        "backing": {
            "driver": "qcow2",
            "node-name": "d0-1",
            "file": {"driver": "file", "node-name": "d0-1-file", "filename": str(base)},
        },
    }
    extra = ["-qtest", f"unix:{vm_dir}/qtest,server=on,wait=off", "-qtest-log", "/dev/null"]
    extra += ["-blockdev", json.dumps(node)]
    machine = "pc"
    if kind == "pflash":
        firmware = vm_dir / "firmware"
        write_idle_rom(firmware)
        extra += ["-blockdev", f"driver=file,node-name=firmware,filename={firmware}"]
        machine = "pc,pflash0=firmware,pflash1=d0"
    elif kind == "floppy":
        extra += ["-device", "isa-fdc", "-device", "floppy,id=vd0,drive=d0,drive-type=144"]
    else:
        extra += ["-device", "sdhci-pci", "-device", "sd-card,id=vd0,drive=d0"]
    return await start_qemu(machine=machine, extra=extra)


async def the_disk(controller):
    [disk] = [one for one in await controller.disks() if one.chain.active.node.name == "d0"]
    return disk


@pytest.mark.parametrize("kind", SIZES)
async def test_no_pivot_for_a_device_that_waits(start_qemu, invariant, vm_dir, kind):
    vm = await start(start_qemu, vm_dir, kind)
    async with qmpblock.connect(vm.monitor_path) as controller:
        disk = await the_disk(controller)
        for refused in (_commit, _allocate_full):
            with pytest.raises(UnsupportedError, match="hang QEMU for good") as caught:
                await refused(disk)
            assert caught.value.exit_code == 2
            assert caught.value.standing == "nothing was touched"
            assert caught.value.remedy
    # The invariant sees that nothing was touched.


async def _commit(disk):
    async with disk.commit():
        pass


async def _allocate_full(disk):
    await disk.allocate(full=True)


@pytest.mark.parametrize("kind", SIZES)
async def test_what_holds_nothing_is_done(start_qemu, invariant, vm_dir, kind):
    """A map, thin allocation, a snapshot, a commit below the active layer, a stream."""
    invariant.expect("node: ", "edge: ", "device: ", "open file: ", "file: .*new.qcow2")
    vm = await start(start_qemu, vm_dir, kind)
    async with qmpblock.connect(vm.monitor_path) as controller:
        disk = await the_disk(controller)
        assert (await disk.map()).where(depth=1, data=True) == Ranges([(0, 64 << 10)])
        assert (await disk.allocate()).allocated == 64 << 10
        await controller.snapshot({disk: vm_dir / "new.qcow2"})
        async with disk.commit(top="@1", base="@2"):
            pass
        assert len(disk.chain.layers) == 2
        async with disk.stream():
            pass
        assert len(disk.chain.layers) == 1
        assert (await disk.map()).where(depth=0, data=True) == Ranges([(0, 64 << 10)])


@asynccontextmanager
async def registers(vm_dir):
    """Yield a function that has QEMU access its devices, as a CPU would; it answers in words."""
    reader, writer = await asyncio.open_unix_connection(str(vm_dir / "qtest"))

    async def access(line):
        writer.write(line.encode() + b"\n")
        async with asyncio.timeout(120):
            return (await reader.readline()).split()

    try:
        yield access
    finally:
        writer.close()


async def test_qemu_hangs_where_a_device_waits(start_qemu, invariant, vm_dir):
    """Why they are refused. Should it fail on a new QEMU, the refusal can go there."""
    vm = await start(start_qemu, vm_dir, "pflash")
    invariant.forget(vm)
    async with registers(vm_dir) as access:

        async def program(value):
            await access(f"writeb {FLASH:#x} {PROGRAM:#x}")
            await access(f"writeb {FLASH:#x} {value:#x}")
            await access(f"writeb {FLASH:#x} {READ:#x}")
            return int((await access(f"readb {FLASH:#x}"))[1], 16)

        assert await program(0x10) == 0x10
        await vm.execute(
            "block-commit", job_id="c", device="d0", auto_finalize=False, auto_dismiss=False
        )
        for wanted, verb in (("ready", "job-complete"), ("pending", None)):
            async with asyncio.timeout(120):
                while (await vm.execute("query-jobs"))[0]["status"] != wanted:
                    await asyncio.sleep(0.002)
            if verb:
                await vm.execute(verb, id="c")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(2):
                await program(0)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1):
                await vm.execute("job-finalize", id="c")
    await vm.kill()
