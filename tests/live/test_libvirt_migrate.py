"""A domain of libvirt's goes from one host to another, by the very commands that `migrate` says.

Two of libvirt's daemons, with nothing in common but a wire: the second has other files under the
same names. The guest writes all the time; the judge is that guest, and the images.
"""

import asyncio
import shutil
import sys
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from chains import cli
from libvirthost import make_chain, run, two_libvirt_hosts
from libvirtkills import Domain

from qmpblock.testing.guest import TinyGuest
from qmpblock.testing.images import Tools
from qmpblock.testing.stamps import StressSpec, check_acknowledged
from qmpblock.testing.whichqemu import version_of

pytestmark = pytest.mark.live

MIB = 1 << 20
SPECS = [
    StressSpec(disk=disk, offset=4 * MIB, blocks=256, block_size=4096, flush_every=32, rate=200)
    for disk in (0, 1)
]


class Pair:
    """Two hosts, a domain at the first, and what is to take its place at the second."""

    def __init__(self, hosts, folder, qemu):
        self.first, self.second = hosts
        self.here, self.there = folder / "here", folder / "there"
        self.qemu = qemu
        seen = folder / "seen"  # where the second's files are, for the first
        link = Path(f"{seen}{self.here}")
        link.parent.mkdir(parents=True)
        link.symlink_to(self.there)
        self.words = {"DESTURI": self.second.uri, "THERE": seen, "STATE": self.here / "state"}

    async def run(self, host, line, more=""):
        """Run a line as it was said, but for what only who runs it can know."""
        for word, value in self.words.items():
            line = line.replace(word, str(value))
        path = f"PATH={Path(sys.executable).parent}:$PATH"
        words = (*host.inside, "sh", "-ec", f"{path}\n{line} {more}")
        return await asyncio.to_thread(run, *words)

    async def run_all(self, host, lines):
        return [await self.run(host, line) for line in lines]


def steps(told):
    """Return the commands that are said, by where and when they are to be run."""
    lines = told.partition("Remedy: ")[2].splitlines()
    found, commands = {}, []
    for line in lines:
        if line.endswith(":"):
            commands = found.setdefault(line.strip(" :"), [])
        elif line.strip():
            commands.append(line.strip())
    return found


@pytest.mark.parametrize(
    "words", [(), ("--layers", "top"), ("--allocation", "full")], ids=["all", "top", "full"]
)
async def test_by_what_is_said(words, vm_dir, qemu_binary):
    """Beforehand nothing is at the destination but what the images lie on, for the top alone."""
    if version_of(qemu_binary) >= (11, 0, 0):
        pytest.skip("libvirt 9.0 migrates by `migrate` with `detach`, which is gone")
    here, there = vm_dir / "here", vm_dir / "there"
    for folder in (here, there):
        folder.mkdir()
    tools, raw, chain = Tools.of(qemu_binary), here / "raw.raw", make_chain(here, qemu_binary)
    run(tools.img, "create", "-q", "-f", "raw", raw, "16M")
    run(tools.io, "-f", "raw", "-c", "write -P 3 0 1M", raw)
    if "top" in words:
        shutil.copy(here / "base.qcow2", there)
    with two_libvirt_hosts(here, there) as hosts:
        pair = Pair(hosts, vm_dir, qemu_binary)
        async with AsyncExitStack() as stack:
            go = [
                Domain(host, "go", raw, folder, qemu_binary, second=chain)
                for host, folder in zip(hosts, (here, there), strict=True)
            ]
            await goes_over(*go, pair, words, stack)


async def goes_over(left, moved, pair, words, stack):
    first, second = pair.first, pair.second
    stack.push_async_exit(moved)  # it comes by the migration
    await moved.console.open()
    await stack.enter_async_context(left)
    for spec in SPECS:
        await left.guest.stress(spec)
    code, _, told = await cli("migrate", left.monitor_path, "unix:/there/is/none", *words)
    assert code == 2, told
    said = steps(told)
    before = {spec.disk: await left.guest.progress(spec.disk) for spec in SPECS}
    if "top" in words:
        [*_, below] = (said.pop(next(iter(said))),)
        await pair.run_all(first, below)
    await pair.run_all(second, said["at the destination, where no file of these names is yet"])
    full = "full" in words
    [migrate] = said["here"]
    await pair.run(first, migrate, "" if full else "--suspend")
    assert "go" not in first.virsh("list", "--all", "--name")
    if full:
        await pair.run_all(second, said["then there, for libvirt gives host space to data alone"])
    listed, disks = await pair.run_all(second, said["then there, to see it"])
    assert {str(pair.here / name) for name in ("raw.raw", "top.qcow2")} <= set(listed.split())
    assert ("base.qcow2" in disks) is ("top" in words)
    if not full:
        *_, closed, compared, on = said.values()
        await pair.run_all(second, closed)
        for told in await pair.run_all(first, compared):
            assert "equal" in told
        await pair.run_all(second, on)
    moved.pid = second.pid("go")
    moved.guest = await TinyGuest.attach(moved.console)
    done = {}
    for spec in SPECS:
        while (now := await moved.guest.progress(spec.disk)).acked == before[spec.disk].acked:
            await asyncio.sleep(0.01)
        done[spec] = await moved.guest.stop_stress(spec.disk)
        assert (done[spec].bad, done[spec].errors) == (0, 0), now
        assert await moved.guest.check(spec.disk) > 0
    await moved.virsh("destroy")
    for spec, image in zip(SPECS, ("raw.raw", "top.qcow2"), strict=True):
        holds(pair, image, spec, done[spec], full=full)
    await moved.start()


def holds(pair, name, spec, done, *, full):
    """See that an image at the destination has every write, all else as it was, and its space."""
    tools, image = Tools.of(pair.qemu), pair.there / name
    data = []
    for one in (pair.here / name, image):
        content = pair.there / "content"
        run(tools.img, "convert", "-f", image.suffix[1:], "-O", "raw", one, content)
        data.append(content.read_bytes())
    area = slice(spec.offset, spec.offset + spec.length)
    verdict = check_acknowledged(data[1][area], spec, done.acked, done.issued)
    assert verdict.ok, f"{name}: {verdict}"
    assert data[1][: area.start] == data[0][: area.start]
    assert data[1][area.stop :] == data[0][area.stop :]
    assert (image.stat().st_blocks * 512 >= len(data[1])) is full
