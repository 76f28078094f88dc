"""Two of libvirt's domains over one base, one in an iothread: what is done to it harms no other."""

import hashlib

import pytest
from chains import cli
from libvirthost import run
from libvirtkills import Domain

from qmpblock.testing.images import Tools
from qmpblock.testing.stamps import StressSpec, check_acknowledged

pytestmark = pytest.mark.live

MIB = 1 << 20
SPEC = StressSpec(offset=4 * MIB, blocks=512, block_size=4096, flush_every=32, rate=300)
VERBS = (
    ("map", "vda"),
    ("allocate", "vda", "--length", "1M"),
    ("snapshot", "vda={}/gone.qcow2"),
    ("commit", "vda", "--base", "@1"),
    ("snapshot", "vda={}/over.qcow2"),
    ("stream", "vda", "--base", "@2"),
    ("allocate", "vda", "--independent"),
)


@pytest.fixture
def images(vm_dir, qemu_binary):
    """Return the active images of two domains over one base."""
    tools, base = Tools.of(qemu_binary), vm_dir / "base.qcow2"
    run(tools.img, "create", "-q", "-f", "qcow2", base, "8M")
    run(tools.io, "-f", "qcow2", "-c", "write -P 7 0 3M", base)
    found = [vm_dir / f"{name}.qcow2" for name in ("one", "other")]
    for image in found:
        run(tools.img, "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", image)
    return found


async def test_two_domains_over_one_base(libvirt, images, vm_dir, qemu_binary):
    base = vm_dir / "base.qcow2"
    before = hashlib.sha256(base.read_bytes()).hexdigest()
    folders = [vm_dir / name for name in ("t1", "t2")]
    for folder in folders:
        folder.mkdir()
    one = Domain(libvirt, "one", images[0], folders[0], qemu_binary, iothread=True)
    other = Domain(libvirt, "other", images[1], folders[1], qemu_binary)
    async with one, other:
        for domain in (one, other):
            await domain.guest.stress(SPEC)
        theirs = await other.chains()
        for how in ((), ("--unmanaged",)):  # whoever would do it: the other one would see it change
            code, _, err = await cli("commit", one.monitor_path, "vda", "--base", "@1", *how)
            assert code == 2, err
            assert f"{base} is open in process {other.pid} too" in err
        for verb, *words in VERBS:
            words = [word.replace("{}", str(vm_dir)) for word in words]
            code, out, err = await cli(verb, one.monitor_path, *words)
            assert code == 0, f"{verb}: {out}{err}"
        assert await one.chains() == (("over.qcow2",), vm_dir / "over.qcow2")
        assert await other.chains() == theirs
        for domain in (one, other):
            done = await domain.guest.stop_stress()
            assert (done.bad, done.errors) == (0, 0), done
            assert await domain.guest.check() > 0
            await domain.virsh("destroy")
            _, image = await domain.chains()
            holds(image, done, vm_dir, qemu_binary)
            await domain.start()
    assert hashlib.sha256(base.read_bytes()).hexdigest() == before


def holds(image, done, folder, qemu):
    """See that an image has every write, and the base's content."""
    raw = folder / "content.raw"
    run(Tools.of(qemu).img, "convert", "-f", "qcow2", "-O", "raw", image, raw)
    data = raw.read_bytes()
    assert data[: 3 * MIB] == bytes([7]) * 3 * MIB
    verdict = check_acknowledged(data[SPEC.offset : 6 * MIB], SPEC, done.acked, done.issued)
    assert verdict.ok, verdict
