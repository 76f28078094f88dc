"""A storage daemon, and a VM whose disk it serves by vhost-user."""

import asyncio
import json
from pathlib import Path

import peers
import pytest
from chains import cli
from disturbed import until

pytestmark = pytest.mark.live


@pytest.fixture
async def daemon(vm_dir, qemu_binary):
    """Start the storage daemon that belongs to the QEMU; yields its monitor and its socket."""
    image, monitor, socket = vm_dir / "image", vm_dir / "daemon", vm_dir / "vhost"
    image.write_bytes(bytes(4 << 20))
    program = Path(qemu_binary).with_name("qemu-storage-daemon")
    process = await asyncio.create_subprocess_exec(
        str(program),
        *("--blockdev", f"file,node-name=f0,filename={image}"),
        *(
            "--export",
            f"vhost-user-blk,id=e,node-name=f0,writable=on,addr.type=unix,addr.path={socket}",
        ),
        *("--chardev", f"socket,id=c,path={monitor},server=on,wait=off"),
        *("--monitor", "chardev=c"),
    )
    try:
        await until(lambda: peers.listens(monitor) and peers.listens(socket), "the daemon")
        yield str(monitor), str(socket)
    finally:
        process.terminate()
        await process.wait()


async def test_a_storage_daemon_is_named(daemon):
    monitor, _ = daemon
    for words in (("disks",), ("jobs",), ("map", "f0"), ("recover",)):
        code, out, err = await cli(words[0], monitor, *words[1:])
        assert (code, out) == (2, ""), words
        assert "no VM but a storage daemon" in err


async def test_a_disk_that_a_daemon_serves(daemon, start_qemu, vm_dir):
    _, socket = daemon
    extra = ["-object", "memory-backend-memfd,id=ram,size=16M,share=on"]
    extra += ["-machine", "memory-backend=ram", "-chardev", f"socket,id=vu,path={socket}"]
    extra += ["-device", "vhost-user-blk-pci,chardev=vu,id=vd9"]
    vm = await start_qemu([], extra=extra)
    code, out, _ = await cli("disks", vm.monitor_path, "--json")
    assert code == 0
    [entry] = json.loads(out)
    assert (entry["device"], entry["layers"], entry["size"]) == ("vd9", [], None)
    assert entry["served_elsewhere"] == {"driver": "vhost-user-blk-pci", "socket": socket}
    code, out, _ = await cli("disks", vm.monitor_path)
    assert f"vd9  vhost-user-blk-pci: the process behind {socket} has its images" in out
    for words in (("map", "vd9"), ("allocate", "vd9"), ("snapshot", f"vd9={vm_dir}/o")):
        code, _, err = await cli(words[0], vm.monitor_path, *words[1:])
        assert code == 2, words
        assert f"the process behind {socket} has its images" in err
