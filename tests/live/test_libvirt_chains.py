"""What changes a chain under libvirt: done by libvirt itself, so that it knows.

The judge is libvirt: what it takes for each disk's images, now and at the next start, and what its
own snapshot, commit, save, restore and start do afterwards.
"""

import asyncio
import contextlib
import os
import signal
import sys
from pathlib import Path

import pytest
from chains import cli
from libvirtdomain import Domain
from libvirthost import make_chain, run

import qmpblock
from qmpblock.errors import DisconnectedError, GraphError
from qmpblock.testing.images import Tools
from qmpblock.testing.whichqemu import version_of

pytestmark = pytest.mark.live

KIB = 1 << 10


@pytest.fixture
def chain(vm_dir, qemu_binary):
    return make_chain(vm_dir, qemu_binary)


@pytest.fixture
def second(vm_dir, qemu_binary):
    """Return an image for a second disk."""
    image = vm_dir / "second.qcow2"
    run(Tools.of(qemu_binary).img, "create", "-q", "-f", "qcow2", image, "4M")
    return image


async def test_a_snapshot_is_one_that_libvirt_took(libvirt, chain, second, qemu_binary):
    domain = Domain(libvirt, "web", qemu_binary, chain, second, iothread=True)
    domain.write(3, 4096)
    domain.write(3, 1024, 1)
    folder = chain.parent
    wanted = f"vda={folder / 'now.qcow2'}", f"vdb={folder / 'then.qcow2'}"
    code, out, err = await cli("snapshot", domain.address, *wanted)
    assert code == 0, err
    assert f"the active layer is now {folder / 'now.qcow2'}" in out
    domain.write(4, 4160)
    domain.write(4, 1088, 1)
    assert domain.chains() == (["now.qcow2", "top.qcow2", "base.qcow2"], "now.qcow2")
    assert domain.chains("vdb") == (["then.qcow2", "second.qcow2"], "then.qcow2")
    assert await domain.layers() == ["now.qcow2", "top.qcow2", "base.qcow2"]
    # libvirt's own verbs go on from there.
    domain.virsh(
        "snapshot-create-as", "--disk-only", "--no-metadata", "--diskspec", "vdb,snapshot=no"
    )
    domain.write(5, 4224)
    domain.virsh("blockcommit", "vda", "--base", str(chain), "--active", "--pivot")
    assert domain.chains() == (["top.qcow2", "base.qcow2"], "top.qcow2")
    if version_of(qemu_binary) < (11, 0, 0):  # libvirt 9.0 saves by `migrate` with `detach`, gone
        domain.virsh("save", str(folder / "saved"))
        libvirt.virsh("restore", str(folder / "saved"))
    domain.end()
    domain.virsh("start")
    domain.write(6, 4288)
    assert domain.chains("vdb") == (["then.qcow2", "second.qcow2"], "then.qcow2")
    await cli("snapshot", domain.address, f"vda={folder / 'last.qcow2'}")
    domain.goes_on()
    domain.end()


async def test_a_stream_is_libvirts_own_pull_with_nothing_left_to_copy(
    libvirt, vm_dir, qemu_binary
):
    """A part of the chain first, in which a layer that is too short hides what lies below."""
    tools = Tools.of(qemu_binary)
    base, short, top = (vm_dir / f"{name}.qcow2" for name in ("base", "short", "top"))
    run(tools.img, "create", "-q", "-f", "qcow2", base, "16M")
    run(tools.io, "-f", "qcow2", "-c", "write -P 1 0 16M", base)
    for image, below, size in ((short, base, "4M"), (top, short, "16M")):
        run(tools.img, "create", "-q", "-f", "qcow2", "-b", below, "-F", "qcow2", image, size)
    run(tools.io, "-f", "qcow2", "-c", "write -P 2 1M 1M", short)
    domain = Domain(libvirt, "streamed", qemu_binary, top)
    domain.write(3, 2048)
    domain.written |= {(0, 0): 1, (0, 1024): 2, (0, 8192): 0}
    code, _, err = await cli("stream", domain.address, "vda", "--top", "@1")
    assert code == 2
    assert f"libvirt has no way to stream into {short}" in err
    code, _, err = await cli("stream", domain.address, "vda", "--base", "@2")
    assert code == 0, err
    assert domain.chains() == (["top.qcow2", "base.qcow2"], "top.qcow2")
    assert await domain.layers() == ["top.qcow2", "base.qcow2"]
    domain.backs_up()
    if version_of(qemu_binary) < (11, 0, 0):  # libvirt 9.0 saves by `migrate` with `detach`, gone
        domain.virsh("save", str(vm_dir / "saved"))
        libvirt.virsh("restore", str(vm_dir / "saved"))
    domain.end()
    domain.virsh("start")
    short.unlink()
    domain.virsh("snapshot-create-as", "--disk-only", "--no-metadata")
    domain.virsh("blockcommit", "vda", "--shallow", "--active", "--pivot")
    code, _, err = await cli("stream", domain.address, "vda", "--top", "@1")
    assert (code, "nothing to do" in err) == (0, False)
    code, out, err = await cli("allocate", domain.address, "vda", "--independent")
    assert code == 0, out + err
    assert domain.chains() == (["top.qcow2"], "top.qcow2")
    base.unlink()
    domain.write(4, 4096)
    assert await cli("stream", domain.address, "vda") == (
        0,
        "nothing to do: virtio-disk0 has no such layers to stream\n",
        "",
    )
    domain.goes_on()
    domain.end()


@pytest.mark.parametrize("victim", ["controller", "qemu"])
async def test_a_stream_is_broken_off(victim, libvirt, chain, qemu_binary):
    """When libvirt's pull has begun: the content is the same, and the next one goes on."""
    domain = Domain(libvirt, f"broken-{victim}", qemu_binary, chain)
    domain.write(3, 4096)
    domain.written |= {(0, 0): 1, (0, 1024): 2}
    code = BROKEN.format(pid="os.getpid()" if victim == "controller" else domain.pid)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, domain.address, stderr=asyncio.subprocess.PIPE
    )
    _, err = await process.communicate()
    assert (process.returncode, b"the domain has ended" in err) in ((-9, False), (1, True)), err
    if victim == "qemu":
        domain.ended()
        domain.virsh("start")
    code, _, told = await cli("recover", domain.address)
    assert code == 0, told
    code, _, told = await cli("stream", domain.address, "vda")
    assert code == 0, told
    assert domain.chains() == (["top.qcow2"], "top.qcow2")
    assert await domain.layers() == ["top.qcow2"]
    (chain.parent / "base.qcow2").unlink()
    domain.end()


BROKEN = """
import asyncio, os, signal, sys, qmpblock
async def main():
    async with qmpblock.connect(sys.argv[1]) as vm:
        disk, real = await vm.disk("vda"), vm.monitor.through
        asked = []
        async def through(ask):
            asked.append(ask)
            answer = await real(ask)
            if len(asked) == 3:  # for names, for layers, to pull
                os.kill({pid}, signal.SIGKILL)
            return answer
        vm.monitor.through = through
        async with disk.stream():
            pass
asyncio.run(main())
"""


async def test_the_vm_starts_from_the_overlay_when_qemu_is_killed(libvirt, chain, qemu_binary):
    domain = Domain(libvirt, "killed", qemu_binary, chain)
    async with qmpblock.connect(domain.address) as vm:
        disk = await vm.disk("vda")
        result = await disk.snapshot(chain.parent / "now.qcow2")
        assert result.overlays[0].node == disk.chain.active.node.name
        domain.write(3, 4096)
        with vm.monitor.subscribe("NOTHING") as events:
            os.kill(domain.pid, signal.SIGKILL)
            with pytest.raises(DisconnectedError):
                await events.get(timeout=60)
    domain.ended()
    domain.virsh("start")
    assert domain.chains() == (["now.qcow2", "top.qcow2", "base.qcow2"], "now.qcow2")
    domain.end()


KILL = """
import asyncio, os, signal, sys, qmpblock
async def main():
    address, overlay, point = sys.argv[1:]
    async with qmpblock.connect(address) as vm:
        left = int(point)
        def counted(real, weight):
            async def call(*words, **how):
                nonlocal left
                left -= weight
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                answer = await real(*words, **how)
                left -= weight
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return answer
            return call
        disk = await vm.disk("vda")
        vm.monitor.through = counted(vm.monitor.through, 1)
        await disk.snapshot(overlay)
asyncio.run(main())
"""


@pytest.mark.parametrize("point", [3, 4, 5, 6])  # asked for names twice, then for the snapshot
async def test_the_controller_is_killed(point, libvirt, chain, qemu_binary):
    """It is taken, or not, and libvirt and QEMU agree."""
    domain = Domain(libvirt, f"left{point}", qemu_binary, chain)
    overlay = chain.parent / "now.qcow2"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", KILL, domain.address, str(overlay), str(point)
    )
    assert await process.wait() == -signal.SIGKILL
    code, _, err = await cli("recover", domain.address)
    assert code == 0, err
    now, later = domain.chains()
    assert (now[0] == overlay.name) is overlay.exists() is (point > 4)
    assert later == now[0]
    assert await domain.layers() == now
    domain.write(3, 4096)
    domain.end()


@pytest.mark.parametrize("point", ["asked", "opened"])
async def test_the_daemon_is_killed(point, libvirt, chain, qemu_binary):
    """While it takes a snapshot: it knows of it, or there is none, or it is said that it does not.

    Between QEMU's doing and its own note it is not held up, so which of these is a matter of luck.
    """
    domain = Domain(libvirt, f"torn-{point}", qemu_binary, chain)
    overlay = chain.parent / "now.qcow2"
    async with qmpblock.connect(domain.address) as vm:
        disk, real = await vm.disk("vda"), vm.monitor.through
        asked = []

        async def through(ask):
            if overlay.exists():
                asked.append(ask)
            if len(asked) != 2:  # the first is for names
                return await real(ask)
            asking = asyncio.create_task(real(ask))
            while point == "opened" and not asking.done() and not opened(domain.pid, overlay):
                await asyncio.sleep(0)
            libvirt.kill()
            return await asking

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(vm.monitor, "through", through)
            with pytest.raises(DisconnectedError, match="went away"):
                await disk.snapshot(overlay)
    libvirt.start()
    async with qmpblock.connect(domain.address) as vm:  # its process lives, but gave it up
        try:
            await vm.recover()
        except GraphError as error:
            assert "started again" in error.standing
            assert overlay.exists()
            code, _, err = await cli("commit", domain.address, "vda", "--base", "@1", "--unmanaged")
            assert code == 0, err
    now, later = domain.chains()
    assert later == now[0]
    assert await domain.layers() == now
    domain.write(3, 4096)
    domain.end()


def opened(pid, file):
    """Whether a process has a file open."""
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            if str(link.readlink()) == str(file):
                return True
    return False


async def test_what_libvirt_does_not_know_is_said(libvirt, chain, qemu_binary):
    """As where its daemon ended between QEMU's doing and its own note."""
    domain = Domain(libvirt, "unknown", qemu_binary, chain)
    wanted = f"vda={chain.parent / 'now.qcow2'}"
    assert (await cli("snapshot", domain.address, wanted, "--unmanaged"))[0] == 0
    code, _, err = await cli("recover", domain.address)
    assert code == 1
    assert f"libvirt takes {chain} for the image of vda" in err
    code, _, err = await cli("commit", domain.address, "vda", "--base", "@1", "--unmanaged")
    assert code == 0, err
    assert (await cli("recover", domain.address))[0] == 0
    domain.write(3, 4096)
    domain.end()


async def test_libvirt_was_faster(libvirt, chain, qemu_binary):
    """What it does between our look and our asking is seen: ours is not done then."""
    domain = Domain(libvirt, "faster", qemu_binary, chain)
    folder = chain.parent
    async with qmpblock.connect(domain.address) as vm:
        disk, real = await vm.disk("vda"), vm.monitor.through
        asked = []

        async def through(ask):
            asked.append(ask)
            if len(asked) == 1:
                one = f"vda,file={folder / 'theirs.qcow2'}"
                domain.virsh(
                    "snapshot-create-as", "--disk-only", "--no-metadata", "--diskspec", one
                )
            return await real(ask)

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(vm.monitor, "through", through)
            with pytest.raises(GraphError, match="just been changed"):
                await disk.snapshot(folder / "ours.qcow2")
    assert not (folder / "ours.qcow2").exists()
    assert domain.chains() == (["theirs.qcow2", "top.qcow2", "base.qcow2"], "theirs.qcow2")
    domain.write(3, 4096)
    domain.end()
