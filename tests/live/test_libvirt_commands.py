"""Commands that ask no more of libvirt than its monitor, and those that it has refused.

The judge is libvirt: what it says of the domain before and after, and what it does then.
"""

import asyncio
import json
import signal
import sys

import pytest
from chains import cli
from libvirtdomain import Domain
from libvirthost import run
from libvirtpoints import HELD, make_four
from prometheus_client.parser import text_string_to_metric_families
from watching import eventually, past_the_end

from qmpblock.testing.faults import Controller
from qmpblock.testing.images import Tools

pytestmark = pytest.mark.live

MIB = 1 << 20


@pytest.fixture
def domain(libvirt, vm_dir, qemu_binary):
    found = Domain(libvirt, "web", qemu_binary, make_four(vm_dir, qemu_binary))
    found.written |= HELD
    yield found
    if "running" in found.virsh("domstate"):
        found.end()
    found.virsh("undefine")


async def inside(host, *words):
    """Run Python in the namespaces, where libvirt is the one of the host; return what it prints."""
    process = await asyncio.create_subprocess_exec(
        *host.inside,
        sys.executable,
        *words,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    return out.decode()


async def test_metrics_are_what_a_map_says(domain):
    before = domain.virsh("dumpxml")
    code, text, err = await cli("metrics", domain.address)
    assert (code, err) == (0, "")
    samples = [one for fam in text_string_to_metric_families(text) for one in fam.samples]
    [info] = [one.labels for one in samples if one.name == "qmpblock_disk_info"]
    assert (info["disk"], info["called"]) == ("virtio-disk0", "vda")
    found = {
        (one.labels["depth"], one.labels["kind"]): one.value
        for one in samples
        if one.name == "qmpblock_disk_layer_bytes"
    }
    code, printed, _ = await cli("map", domain.address, "vda", "--totals", "--json")
    layers = json.loads(printed)["totals"]
    assert [found[str(layer["depth"]), "data"] for layer in layers] == [
        layer["data"] for layer in layers
    ]
    assert sum(layer["data"] for layer in layers) == 4 * MIB - MIB // 2
    assert domain.virsh("dumpxml") == before


async def test_jobs_of_ours_are_steered_and_libvirts_are_not(domain, vm_dir):
    command = (sys.executable, "-m", "qmpblock", "commit", domain.address, "vda")
    words = ("--top", "@1", "--base", "@2", "--speed", "64K")
    async with Controller([*command, *words], vm_dir) as committing:

        async def ours():
            _, out, _ = await cli("jobs", domain.address, "--json")
            return [one["id"] for one in json.loads(out) if one["ours"]]

        [job] = await eventually(ours, "begin a job")
        for verb in ("pause", "resume"):
            code, out, err = await cli("job", domain.address, job, verb)
            assert (code, out) == (0, f"{verb}: {job}\n"), err
        code, _, err = await cli("job", domain.address, job, "speed", "0")
        assert code == 0, err
        assert await committing.wait() == 0, committing.stderr
    assert domain.chains()[0] == ["now.qcow2", "top.qcow2", "base.qcow2"]
    domain.virsh("blockcopy", "vda", str(vm_dir / "theirs"), "--transient-job")
    [theirs] = json.loads((await cli("jobs", domain.address, "--json"))[1])
    assert not theirs["ours"]
    code, _, err = await cli("job", domain.address, theirs["id"], "cancel")
    assert code == 2, err
    assert theirs["id"] in (await cli("jobs", domain.address))[1]
    domain.virsh("blockjob", "vda", "--abort")


async def test_room_is_kept_ahead_of_the_guest(domain, vm_dir):
    policy, image = vm_dir / "policy.yaml", vm_dir / "now.qcow2"
    disk = "{disk: vda, ahead: 2M}"
    policy.write_text(f"vms: [{{address: '{domain.address}', disks: [{disk}]}}]")
    before = domain.virsh("dumpxml")
    code, _, err = await cli("apply", str(policy))
    assert code == 0, err
    assert past_the_end(image) == 2 * MIB
    watch = [sys.executable, "-m", "qmpblock", "apply", str(policy), "--watch"]
    async with Controller(watch, vm_dir) as watching:
        await watching.wait_for_output("keeping the room ahead of 1 disk")
        for number in range(32):
            domain.write(9, 8192 + 64 * number)
        await watching.wait_for_output(r"virtio-disk0 of .*: [1-9][\d,]+ bytes reserved")
        await eventually(lambda: past_the_end(image) >= MIB, "keep the room")
        watching.kill(signal.SIGINT)
        assert await watching.wait() == 130, watching.stderr
    assert domain.virsh("dumpxml") == before
    assert (await cli("recover", domain.address))[1].startswith("nothing to recover")


async def test_what_is_refused_is_done_when_the_user_sees_to_it(domain, vm_dir, qemu_binary):
    """Then libvirt backs it up by itself, and pulls, as if nothing had been."""
    tools, copy, backups = Tools.of(qemu_binary), vm_dir / "copy.qcow2", vm_dir / "backups"
    exported = vm_dir / "exported"
    convert = f"{tools.img} convert -f raw -O raw $NBD_URI {exported}"
    for way, made, verb, *words in (
        ("virsh b", copy, "copy", "vda", copy),
        ("virsh backup-begin web BACKUP.xml CHECKPOINT.xml", backups, "backup", backups),
        ("virsh backup-begin web PULL.xml", exported, "export", "vda", "--", "sh", "-c", convert),
    ):
        before, asked = domain.virsh("dumpxml"), (domain.address, *map(str, words))
        code, _, err = await cli(verb, *asked)
        assert code == 2, err
        assert f"Remedy: {way}" in err
        assert not made.exists()
        code, out, err = await cli(verb, "--unmanaged", *asked)
        assert code == 0, out + err
        assert domain.virsh("dumpxml") == before
    [backup] = backups.glob("*.qcow2")
    for image, fmt in ((copy, "qcow2"), (backup, "qcow2"), (exported, "raw")):
        for (_, where), pattern in domain.written.items():
            run(tools.io, "-r", "-f", fmt, "-c", f"read -P {pattern} {where}k 64k", image)
    assert await domain.layers() == domain.chains()[0]
    domain.goes_on()


async def test_a_domain_of_the_hosts_own_libvirt(domain):
    """`libvirt:DOMAIN`, as `vms` tells it, where libvirt is at its own place."""
    command = (
        "import sys\n"
        "from qmpblock.cli.app import run\n"
        "from qmpblock.inventory import listing\n"
        "every = listing.qemus\n"  # those of others on this host are left alone
        f"listing.qemus = lambda: [one for one in every() if one.pid == {domain.pid}]\n"
        "sys.exit(run(['vms', '--json']))\n"
    )
    [vm] = json.loads(await inside(domain.host, "-c", command))
    assert (vm["address"], vm["trouble"]) == ("libvirt:web", "")
    shown = await inside(domain.host, "-m", "qmpblock", "map", "libvirt:web", "vda", "--json")
    assert json.loads(shown) == json.loads((await cli("map", domain.address, "vda", "--json"))[1])
    asked = "snapshot", "libvirt:web", f"vda={domain.file('vda')}.over"
    await inside(domain.host, "-m", "qmpblock", *asked)
    assert domain.chains()[1] == "now.qcow2.over"
