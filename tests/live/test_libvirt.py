"""Through libvirt's own monitor: what is read, thin allocation, and a daemon that goes away.

The judge is libvirt: what it says of the domain, and what its own commands do afterwards.
"""

import asyncio
import json
import os
import re
import signal
import sys
from pathlib import Path

import pytest
from chains import cli
from libvirtdomain import Domain
from libvirthost import make_chain, run, start
from libvirtpoints import HELD, make_four

import qmpblock
from qmpblock.address import LibvirtAddress
from qmpblock.errors import ConnectError, DisconnectedError, NotFoundError, UnsupportedError
from qmpblock.inventory import listing
from qmpblock.inventory.processes import Found
from qmpblock.testing.images import Tools

pytestmark = pytest.mark.live

MIB = 1 << 20
DISK = "virtio-disk0"  # as QEMU calls it, by whatever monitor


@pytest.fixture
def chain(vm_dir, qemu_binary):
    return make_chain(vm_dir, qemu_binary)


async def test_what_is_read_and_allocated_is_right_and_leaves_nothing(libvirt, chain, qemu_binary):
    expected = json.loads(
        run(Tools.of(qemu_binary).img, "map", "-f", "qcow2", "--output=json", chain)
    )
    shown = start(libvirt, "web", chain, qemu_binary)
    before, address = shown(), libvirt.address("web")
    code, out, _ = await cli("map", address, "vda", "--json")
    keys = ("start", "length", "depth", "present", "zero", "data")
    assert code == 0
    assert json.loads(out) == [{key: one[key] for key in keys} for one in expected]
    code, out, _ = await cli("disks", address, "--json")
    [said] = json.loads(out)
    assert (said["device"], said["called"]) == (DISK, "vda")
    assert [Path(one["file"]).name for one in said["layers"]] == ["top.qcow2", "base.qcow2"]
    assert (await cli("disks", address))[1].startswith(f"{DISK} (vda)  ")
    code, out, _ = await cli("doctor", address)
    assert f"{libvirt.pid('web')}, of root" in out
    assert await cli("jobs", address) == (0, "This VM has no jobs.\n", "")
    async with qmpblock.connect(address) as vm:
        assert vm.monitor.peer_pid == libvirt.pid("web")
        disk = await vm.disk("vda")
        assert disk.name == (await vm.disk("virtio-disk0")).name
        with pytest.raises(NotFoundError, match=r"no disk called vdb.*\n  vda: virtio-disk0 \("):
            await vm.disk("vdb")
        assert [layer.layer.depth for layer in await disk.layers()] == [0, 1]
        result = await disk.allocate()
        assert result.allocated == MIB // 2
        assert not (await disk.map()).not_in_active()
    assert (await cli("recover", address))[0] == 0
    assert shown() == before
    # And libvirt's own verbs go on from there.
    libvirt.virsh("snapshot-create-as", "web", "--disk-only", "--no-metadata")
    libvirt.virsh("blockcommit", "web", "vda", "--shallow", "--active", "--pivot")
    assert str(chain) in libvirt.virsh("domblklist", "web")
    libvirt.virsh("destroy", "web")
    assert run("qemu-io", "-r", "-f", "qcow2", "-c", "read -P 1 0 512k", chain)
    assert run("qemu-io", "-r", "-f", "qcow2", "-c", "read -P 2 512k 1M", chain)


async def test_what_qemu_says_goes_through_virtlogd(libvirt, chain, qemu_binary):
    """Both of libvirt's daemons run, as on a host where it is installed."""
    pid = libvirt.domain("heard", chain, "qcow2", qemu_binary)
    ends = {link.readlink() for link in Path(f"/proc/{libvirt.logger}/fd").iterdir()}
    assert Path(f"/proc/{pid}/fd/2").readlink() in ends
    libvirt.kill()
    libvirt.start()
    os.kill(pid, signal.SIGTERM)  # of which QEMU tells
    async with asyncio.timeout(60):
        while "terminating on signal 15" not in libvirt.log("heard").read_text():
            await asyncio.sleep(0.05)


async def test_its_domains_are_among_the_vms_of_this_host(libvirt, chain, qemu_binary, monkeypatch):
    """The daemon is in a namespace of the tests', so the address is made to lead there."""
    pid = libvirt.domain("listed", chain, "qcow2", qemu_binary)
    address, every = LibvirtAddress("listed", libvirt.uri), listing.qemus
    with monkeypatch.context() as patched:
        patched.setattr(listing, "qemus", lambda: [one for one in every() if one.pid == pid])
        patched.setattr(listing, "_by_libvirt", lambda *_: asyncio.sleep(0, Found(address)))
        [one] = await qmpblock.vms()
        assert one.called == {DISK: "vda"}
    assert (one.name, one.manager.name, one.manager.vm) == ("listed", "libvirt", "listed")
    assert (one.address, one.trouble) == (str(address), "")
    assert [device.chain.active.file for device in one.devices] == [str(chain)]
    async with qmpblock.connect(address) as vm:
        disk = await vm.disk("vda")
        with pytest.raises(UnsupportedError) as caught:
            async with vm.point_in_time([disk]):
                pass
    assert "snapshot" not in one.refused
    assert caught.value.remedy.startswith(one.refused["a point in time"])


async def test_what_libvirt_would_not_know_is_refused_with_its_own_command(
    libvirt, chain, qemu_binary
):
    shown = start(libvirt, "kept", chain, qemu_binary)
    before = shown()
    async with qmpblock.connect(libvirt.address("kept")) as vm:
        disk = await vm.disk("vda")
        with pytest.raises(UnsupportedError, match="libvirt") as refused:
            await disk.snapshot(chain.parent / "overlay.qcow2", format="qed")
        assert "qcow2" in refused.value.remedy
        with pytest.raises(UnsupportedError, match="libvirt") as refused:
            async with vm.point_in_time([disk]):
                pass
        assert "virsh" in refused.value.remedy
    assert shown() == before
    assert not (chain.parent / "overlay.qcow2").exists()
    libvirt.virsh("destroy", "kept")


class Said:
    """A domain of four layers, with a monitor that is not libvirt's, and what is said of it there.

    :ivar words: what stands for the placeholders of what is said.
    """

    def __init__(self, domain, monitor, folder, **words):
        self.domain, self.monitor, self.folder, self.words = domain, str(monitor), folder, words
        self.tools = Tools.of(domain.qemu)

    async def by(self, verb, *words):
        """Have a command be refused; return the commands that it says instead."""
        code, _, err = await cli(verb, self.monitor, *map(str, words))
        assert code == 2, err
        lines = re.findall("virsh [^;,]+", err.partition("Remedy: ")[2])
        assert lines, err
        return lines

    async def do(self, line):
        """Run one as it was said, but for what only who runs it can know."""
        for word, value in self.words.items():
            line = re.sub(rf"(?<= ){word}(?= |$)", str(value), line)
        return await asyncio.to_thread(run, *self.domain.host.inside, "sh", "-ec", line)

    async def done(self, verb, *words):
        for line in await self.by(verb, *words):
            await self.do(line)

    async def ended(self):
        """Wait until a backup of libvirt's has ended."""
        while "None" not in self.domain.virsh("domjobinfo"):
            await asyncio.sleep(0.05)

    def image(self, disk="vda"):
        return Path(self.domain.file(disk))

    def holds(self, image, *options):
        """See that an image has all that the guest wrote."""
        for (_, where), pattern in self.domain.written.items():
            words = f"read -P {pattern} {where}k 64k"
            run(self.tools.io, "-r", "-c", words, *(options or ("-f", "qcow2")), image)


@pytest.fixture
def said(libvirt, vm_dir, qemu_binary):
    monitor, socket = vm_dir / "qmp", f"<server transport='unix' socket='{vm_dir}/nbd'/>"
    words = {"TARGET": vm_dir / "copy"}
    for name, text in (
        ("PULL", f"<domainbackup mode='pull'>{socket}</domainbackup>"),
        ("BACKUP", "<domainbackup/>"),
        ("CHECKPOINT", "<domaincheckpoint/>"),
    ):
        words[f"{name}.xml"] = vm_dir / f"{name}.xml"
        words[f"{name}.xml"].write_text(text)
    domain = Domain(libvirt, "said", qemu_binary, make_four(vm_dir, qemu_binary), monitor=monitor)
    domain.written |= HELD
    domain.write(5, 2048)
    yield Said(domain, monitor, vm_dir, **words)
    domain.end()
    domain.virsh("undefine", "--snapshots-metadata", "--checkpoints-metadata")


async def test_what_is_said_to_copy_a_disk_does(said):
    before, now = said.domain.chains(), said.image()
    copy, socket = said.folder / "copy", said.folder / "nbd"
    await said.done("copy", DISK, said.folder / "mine", "--at", "end")
    said.holds(copy)
    assert said.domain.chains() == before
    for verb, *words in (
        ("copy", DISK, said.folder / "mine"),  # before QEMU 10.0 of frozen layers
        ("backup", said.folder / "backups"),
        ("export", DISK, "--", "true"),
    ):
        copy.unlink(missing_ok=True)
        begin, *end = await said.by(verb, *words)
        await said.do(begin)
        if "PULL" in begin:
            said.holds(f"nbd+unix:///vda?socket={socket}", "-f", "raw")
            [end] = end
            await said.do(end)
        elif "backup-begin" in begin:
            await said.ended()
            [made] = said.folder.glob(f"{now.name}.*")
            said.holds(made)
            made.unlink()
        else:
            said.holds(copy)
        assert said.domain.chains() == before
    assert said.domain.virsh("checkpoint-list", "--name").strip()  # of the backup
    await said.done("copy", DISK, said.folder / "mine", "--pivot")
    assert said.domain.chains() == (["copy"], "copy")


async def test_what_is_said_to_copy_a_disk_below_a_filter_does(libvirt, chain, qemu_binary):
    """The filter is gone then, and so is what it read from: the copy lies on nothing."""
    folder, driver = chain.parent, " copy_on_read='on'"
    domain = Domain(libvirt, "filtered", qemu_binary, chain, driver=driver)
    domain.written |= {(0, 0): 1, (0, 1024): 2}
    target, copy = folder / "TARGET.xml", folder / "copy.qcow2"
    target.write_text(f"<disk type='file'><driver type='qcow2'/><source file='{copy}'/></disk>")
    said = Said(domain, domain.address, folder, **{"DOMAIN": domain.name, target.name: target})
    await said.done("copy", "vda", folder / "mine", "--pivot")
    assert domain.chains() == ([copy.name], copy.name)
    assert await domain.layers() == [copy.name]
    domain.write(5, 2048)
    domain.end()


async def test_what_is_said_to_change_a_chain_does(said):
    """From a snapshot down to one layer; no command drops any but what it was said for."""
    await said.done("snapshot", f"{DISK}={said.folder / 'mine'}")
    active = said.image().name
    assert said.domain.chains()[0] == [active, "now.qcow2", "mid.qcow2", "top.qcow2", "base.qcow2"]
    said.domain.write(6, 2112)
    await said.done("commit", DISK, "--top", "@1", "--base", "@2")
    assert said.domain.chains() == ([active, "mid.qcow2", "top.qcow2", "base.qcow2"], active)
    await said.done("stream", DISK, "--base", "@2")
    assert said.domain.chains() == ([active, "top.qcow2", "base.qcow2"], active)
    said.words |= {"TOP": said.folder / "top.qcow2", "BASE": said.folder / "base.qcow2"}
    await said.done("stream", DISK, "--top", "@1")
    assert said.domain.chains() == ([active, "base.qcow2"], active)
    await said.done("commit", DISK)
    assert said.domain.chains() == (["base.qcow2"], "base.qcow2")
    await said.done("snapshot", f"{DISK}={said.folder / 'mine'}")
    active = said.image().name
    said.domain.write(7, 2176)
    await said.done("allocate", DISK, "--independent")
    assert said.domain.chains() == ([active], active)


@pytest.mark.parametrize("name", ["raw", "raw? & 'öd'"])
async def test_a_raw_image_gets_its_host_space(name, libvirt, vm_dir, qemu_binary):
    """By QEMU's process, which is found whatever the domain is called."""
    image = vm_dir / "disk.raw"
    run("qemu-img", "create", "-q", "-f", "raw", image, "8M")
    shown = start(libvirt, name, image, qemu_binary, "raw")
    before, address = shown(), libvirt.address(name)
    code, _, err = await cli("allocate", address, "vda", "--full")
    assert (code, image.stat().st_blocks * 512 >= 8 * MIB) == (0, True), err
    policy = vm_dir / "policy.yaml"
    disk = "{disk: vda, allocation: full}"
    policy.write_text(f"vms: [{{address: {json.dumps(address)}, disks: [{disk}]}}]")
    code, out, err = await cli("plan", str(policy))
    assert (code, "nothing to do" in out) == (0, True), out + err
    assert shown() == before
    libvirt.virsh("destroy", name)


async def test_the_daemon_is_killed_and_comes_back(libvirt, chain, qemu_binary):
    shown = start(libvirt, "lasting", chain, qemu_binary)
    before = shown()
    async with qmpblock.connect(libvirt.address("lasting")) as vm:
        disk, monitor = await vm.disk("vda"), vm.monitor
        real, struck = monitor._execute, []

        async def execute(command, arguments=None, **how):
            answer = await real(command, arguments, **how)
            if command == "block-export-add" and not struck:
                struck.append(command)
                libvirt.kill()
                libvirt.start()
            return answer

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(monitor, "_execute", execute)
            await disk.allocate()
        assert struck
        assert not (await disk.map()).not_in_active()
        with monitor.subscribe("STOP") as events:  # heard of by the new daemon
            await monitor.execute("stop")
            await events.get(timeout=120)
        await monitor.execute("cont")
    assert shown() == before
    libvirt.virsh("destroy", "lasting")


async def test_what_was_under_way_when_the_daemon_died(libvirt, chain, qemu_binary):
    libvirt.domain("torn", chain, "qcow2", qemu_binary)
    async with qmpblock.connect(libvirt.address("torn")) as vm:
        libvirt.signal(signal.SIGSTOP)  # so that it has the question, and no answer
        asked = asyncio.create_task(vm.monitor.execute("query-status"))
        await asyncio.sleep(0)
        libvirt.kill()
        libvirt.start()
        assert (await asked)["status"] == "running"
        libvirt.signal(signal.SIGSTOP)
        asked = asyncio.create_task(vm.monitor.execute("cont"))
        await asyncio.sleep(0)
        libvirt.kill()
        with pytest.raises(DisconnectedError, match=r"lost during cont .*went away") as lost:
            await asked
        assert lost.value.standing == "whether QEMU carried it out is unknown"
        with pytest.raises(DisconnectedError, match="went away"):
            await vm.monitor.execute("query-status")
    libvirt.start()
    async with qmpblock.connect(libvirt.address("torn")) as vm:
        assert (await vm.monitor.execute("query-status"))["running"]
    libvirt.virsh("destroy", "torn")


async def test_the_controller_is_killed_and_what_it_left_goes(libvirt, chain, qemu_binary):
    """Its descriptors are the daemon's, so whoever comes next can close them."""
    shown = start(libvirt, "left", chain, qemu_binary)
    before, address = shown(), libvirt.address("left")
    code = (
        "import asyncio, os, signal, sys, qmpblock\n"
        "async def main():\n"
        "    async with qmpblock.connect(sys.argv[1]) as vm:\n"
        "        real = vm.monitor._execute\n"
        "        async def execute(command, arguments=None, **how):\n"
        "            answer = await real(command, arguments, **how)\n"
        "            if command == 'block-export-add':\n"
        "                os.kill(os.getpid(), signal.SIGKILL)\n"
        "            return answer\n"
        "        vm.monitor._execute = execute\n"
        "        await (await vm.disk('vda')).map()\n"
        "asyncio.run(main())\n"
    )
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, address)
    assert await process.wait() == -signal.SIGKILL
    assert shown()[-1] > before[-1]
    libvirt.kill()
    libvirt.start()
    code, _, err = await cli("recover", address)
    assert code == 0, err
    assert shown() == before
    libvirt.virsh("destroy", "left")


async def test_the_domain_ends(libvirt, chain, qemu_binary):
    pid = libvirt.domain("ending", chain, "qcow2", qemu_binary)
    async with qmpblock.connect(libvirt.address("ending")) as vm:
        with vm.monitor.subscribe("NOTHING") as events:
            os.kill(pid, signal.SIGKILL)
            with pytest.raises(DisconnectedError, match="the domain has ended"):
                await events.get(timeout=60)
        with pytest.raises(DisconnectedError, match="the domain has ended"):
            await vm.monitor.execute("query-status")
    code, _, err = await cli("disks", libvirt.address("ending"))
    assert code == 3
    assert "libvirt runs no domain ending" in err


async def test_what_is_not_there_is_said(libvirt, tmp_path):
    with pytest.raises(ConnectError, match="runs no domain nosuch"):
        async with qmpblock.connect(libvirt.address("nosuch")):
            pass
    with pytest.raises(ConnectError, match="libvirt does not answer") as refused:
        async with qmpblock.connect(f"libvirt:qemu+unix:///system?socket={tmp_path}/none?web"):
            pass
    assert "virtqemud" in refused.value.remedy
