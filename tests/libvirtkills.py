"""Kill matrices of libvirt's domains: qmpblock, libvirt's daemon or QEMU killed at each command.

As in `killing.py` one run to the end tells the commands of an operation, and what libvirt is asked
for; then each point has a domain of its own, whose guest writes all the time. The judge is libvirt,
and the guest (`Point.settled`): what libvirt takes for the disk's images, now and at the next
start, is what QEMU has open; its own snapshot, commit, save, restore, destroy and start go on from
there; and no write is lost in the image that it starts the domain from.
"""

import asyncio
import contextlib
import dataclasses
import os
import re
import shutil
import signal
from collections import Counter
from pathlib import Path

from allocatekills import Allocation
from dying import deadly, run
from killing import AREA, CHAIN, MOMENTS, Graveyard, Operation, have_own_places
from rounds import rounds, slice_of_soak

import qmpblock
from qmpblock.errors import DisconnectedError, Error
from qmpblock.testing.guest import FIRMWARE, GuestConsole, GuestError, TinyGuest
from qmpblock.testing.images import Tools, build
from qmpblock.testing.invariant import VMState, difference, snapshot
from qmpblock.testing.scenario import parse_scenario
from qmpblock.testing.stamps import StressSpec, check_acknowledged
from qmpblock.testing.whichqemu import version_of

#: Who is killed. After a controller somebody undoes, or does the same again; what lives goes on by
#: itself where the daemon or QEMU is killed under it; `all` is a host that loses its power.
VICTIMS = ("controller-undo", "controller-again", "daemon", "qemu", "all")
_SETTLE = 5.0  # seconds for QEMU to close what it was told to close
_STALL = 60.0  # seconds without a write of the guest's that count as a hang

RAW = """
about: A raw disk without host space.
images:
  - {format: raw, size: 8M, content: [write 0 1M 0xaa]}
"""
_DOMAIN = """\
<domain type='qemu'>
  <name>{name}</name><memory unit='MiB'>16</memory><vcpu current='1'>2</vcpu>{threads}
  <os><type arch='x86_64' machine='pc'>hvm</type><loader type='rom'>{firmware}</loader></os>
  <features><acpi/></features>
  <devices>
    <emulator>{emulator}</emulator>
    {disks}
    <serial type='unix'><source mode='connect' path='{serial}'/><target port='0'/></serial>
    <controller type='usb' model='none'/><memballoon model='none'/>
  </devices>
</domain>
"""


_DISK = """<disk type='file' device='disk'>
      <driver name='qemu' type='{kind}'{more}/><source file='{image}'/>
      <target dev='{name}' bus='virtio'/>
    </disk>
"""


class Domain:
    """A domain, mostly with one disk, whose firmware is the tiny guest. `async with`.

    :ivar monitor_path: of it, as an address.
    :ivar pid: QEMU's.
    """

    def __init__(self, host, name, image, directory, emulator, *, second=None, iothread=False):
        self.host, self.name, self.image = host, name, image
        self.monitor_path = host.address(name)
        self.console = GuestConsole(str(directory / "serial"))
        self._xml = directory / "domain.xml"
        self._xml.write_text(
            _DOMAIN.format(
                name=name,
                firmware=FIRMWARE,
                emulator=emulator,
                disks=_disk_xml("vda", image, " iothread='1'" if iothread else "")
                + ("" if second is None else _disk_xml("vdb", second)),
                serial=self.console.path,
                threads="<iothreads>1</iothreads>" if iothread else "",
            )
        )

    async def __aenter__(self):
        await self.console.open()
        await self.virsh_of("define", str(self._xml))
        await self.start()
        return self

    async def __aexit__(self, *_):
        with contextlib.suppress(AssertionError):  # it does not run
            await self.virsh("destroy")
        with contextlib.suppress(AssertionError):
            await self.virsh("undefine", "--managed-save")
        await self.console.close()

    def evidence(self):
        return f"the domain {self.name}"

    async def virsh_of(self, *words):
        return await asyncio.to_thread(self.host.virsh, *words)

    async def virsh(self, verb, *words):
        return await self.virsh_of(verb, self.name, *words)

    async def start(self):
        """Start it, and its guest."""
        self.console.take_ready()
        await self.virsh("start")
        self.pid = self.host.pid(self.name)
        self.guest = await TinyGuest.ready(self.console)

    async def save_and_restore(self, file):
        """Have libvirt save its state, and restore that; the guest goes on."""
        await self.virsh("save", str(file))
        await self.goes_on("restore", str(file))

    async def goes_on(self, *words):
        """Have libvirt bring it back from where it was saved; the guest goes on."""
        await self.virsh_of(*words)
        self.pid = self.host.pid(self.name)
        self.guest = await TinyGuest.attach(self.console)

    @property
    def runs(self):
        """Whether its QEMU does."""
        with contextlib.suppress(OSError):
            return b"qemu" in Path(f"/proc/{self.pid}/cmdline").read_bytes()
        return False

    async def kill(self):
        """Kill its QEMU (-9), and wait until libvirt knows."""
        os.kill(self.pid, signal.SIGKILL)
        await self.is_off()

    async def progress(self, before):
        """Return what the guest has written: of one that is paused for a moment, what it had."""
        paused = "paused" in await self.virsh("domstate")
        return before if paused else await self.guest.progress()

    async def is_off(self):
        async with asyncio.timeout(_STALL):
            while (await self.virsh("domstate")).strip() != "shut off":
                await asyncio.sleep(0.02)

    async def chains(self):
        """Return the disk's chain as libvirt has it now, and its image at the next start."""
        now = re.findall("<source file='(.*?)'", _disk(await self.virsh("dumpxml")))
        later = re.findall("<source file='(.*?)'", _disk(await self.virsh("dumpxml", "--inactive")))
        return tuple(Path(file).name for file in now), Path(later[0])


def _disk_xml(name, image, more=""):
    kind = "raw" if image.suffix == ".raw" else "qcow2"
    return _DISK.format(name=name, kind=kind, image=image, more=more)


def _disk(xml):
    [found] = re.findall("<disk .*?</disk>", xml, re.DOTALL)
    return found


def _operations():
    chain = ("d0-3.qcow2", "d0-2.qcow2", "d0-1.qcow2", "d0-0.raw")
    plain, iothread = CHAIN.format(attach=""), ("iothread",)
    overlay = {"do": "snapshot", "overlays": {"vda": "{}/new-0.qcow2"}}
    stream, allocate = ({"do": verb, "disk": "vda"} for verb in ("stream", "allocate"))
    over, alone = (("new-0.qcow2", *chain),), (chain[:1],)
    yield Operation("map", plain, {"do": "map", "disk": "vda"}, (chain,))
    yield Allocation("allocate", plain, allocate, (chain,))
    yield Allocation("full-raw", RAW, allocate | {"full": True}, (("d0-0.raw",),))
    yield Allocation("full", plain, allocate | {"full": True}, (chain,))
    yield Allocation("independent", plain, allocate | {"independent": True}, alone)
    yield Operation("snapshot", plain, overlay, over)
    yield Operation("stream", plain, stream, alone)
    part = ((chain[0], *chain[2:]),)
    yield Operation("stream-base", plain, stream | {"base": "{}/d0-1.qcow2"}, part)
    yield Operation("snapshot-iothread", plain, overlay, over, extra=iothread)
    yield Operation("stream-iothread", plain, stream, alone, extra=iothread)
    yield Allocation("allocate-iothread", plain, allocate, (chain,), extra=iothread)


def _commits():
    chain = ("d0-3.qcow2", "d0-2.qcow2", "d0-1.qcow2", "d0-0.raw")
    plain, commit = CHAIN.format(attach=""), {"do": "commit", "disk": "vda"}
    middle = commit | {"top": "{}/d0-2.qcow2", "base": "{}/d0-1.qcow2"}
    yield Operation("commit-middle", plain, middle, ((chain[0], *chain[2:]),))
    pivot = commit | {"base": "{}/d0-2.qcow2"}
    yield Operation("pivot", plain, pivot, (chain[1:],))
    yield Operation("pivot-iothread", plain, pivot, (chain[1:],), extra=("iothread",))


def _moves():
    chain = ("d0-3.qcow2", "d0-2.qcow2", "d0-1.qcow2", "d0-0.raw")
    plain, copy = CHAIN.format(attach=""), {"do": "copy", "pivot": True}
    new, raw = {"targets": {"vda": "{}/new-0.qcow2"}}, {"targets": {"vda": "{}/new-0.raw"}}
    yield Operation("move", plain, copy | new, (("new-0.qcow2",),))
    yield Operation(
        "move-top", plain, copy | new | {"layers": "top"}, (("new-0.qcow2", *chain[1:]),)
    )
    yield Operation("move-raw", plain, copy | raw | {"format": "raw"}, (("new-0.raw",),))
    yield Operation("move-iothread", plain, copy | new, (("new-0.qcow2",),), extra=("iothread",))


OPERATIONS = tuple(_operations())
COMMITS = tuple(_commits())
MOVES = tuple(_moves())


class Point:
    """One domain, from its start to the last look at its images. `async with`."""

    def __init__(self, matrix, label):
        self.matrix, self.label, self.operation = matrix, label, matrix.operation
        self.directory = matrix.directory / str(matrix.count)
        self.images = self.directory / "images"
        self.spec = StressSpec(seed=1, flush_every=32, read_percent=20, rate=500, **AREA)
        self.content = matrix.content
        self.started_again = False

    async def __aenter__(self):
        have_own_places(self.directory)
        await self.matrix.tools.run(
            "cp", "-R", "--sparse=always", str(self.matrix.built.directory), str(self.images)
        )
        [disk] = self.matrix.built.disks
        self.domain = Domain(
            self.matrix.host,
            f"{self.operation.name}-{self.matrix.count}",
            self.images / disk.active.path.name,
            self.directory,
            self.matrix.qemu,
            iothread="iothread" in self.operation.extra,
        )
        try:
            await self.domain.__aenter__()
            self.before = await self.state()
            await self._let_write()
        except BaseException:
            await self.domain.__aexit__()
            raise
        return self

    async def __aexit__(self, kind, error, trace):
        if error is not None:
            error.add_note(f"at the point: {self.label}")
        await self.domain.__aexit__()
        shutil.rmtree(self.directory, ignore_errors=True)

    # looking

    async def state(self):
        """Return the state of the VM, with what differs between points taken out."""
        lines = Counter()
        async with qmpblock.connect(self.domain.monitor_path) as vm:
            seen = await snapshot(vm.monitor, self.domain.pid, [self.images])
        for line, count in seen.lines.items():
            if ".journal" in line and self.started_again:
                continue  # of the QEMU that died: it is for its images' recovery
            line = line.replace(str(self.directory), "DIR").replace(self.domain.name, "NAME")
            lines[re.sub(r"libvirt-\d+-", "libvirt-N-", line)] += count
        return VMState(dict(lines))

    async def guest_moves(self, what="acked"):
        """See that the guest's writes are acknowledged (or `flushed`)."""
        first, deadline = None, asyncio.get_running_loop().time() + _STALL
        while True:
            seen = await self.domain.guest.progress()
            first = getattr(seen, what) if first is None else first
            if getattr(seen, what) > max(first, 0):
                return seen
            assert asyncio.get_running_loop().time() < deadline, f"{self.label}: it hangs: {seen}"
            await asyncio.sleep(0.01)

    async def is_done(self):
        """See that the disk is as documented."""
        async with qmpblock.connect(self.domain.monitor_path) as vm:
            disk = await vm.disk("vda")
            chain = tuple(Path(layer.file).name for layer in disk.chain.layers)
        assert (chain,) == self.operation.chains, self.label
        await self.operation.check_done(self.domain.monitor_path, self.images)

    # going on

    async def strike(self, request, number, moment, victim):
        """Kill the daemon, or QEMU, under a controller in this process; return whether it was."""
        struck = []

        async def die():
            struck.append(number)
            if victim == "daemon":
                self.matrix.host.kill()
                self.matrix.host.start()
            else:
                self.seen = await self.domain.progress(self.seen)
                await self.domain.kill()

        @contextlib.asynccontextmanager
        async def connect(address):
            async with qmpblock.connect(address) as vm:
                deadly(vm.monitor, number, moment, die)
                yield vm

        with contextlib.suppress(DisconnectedError):
            await run(self.domain.monitor_path, request, connect)
        return bool(struck)

    async def die(self, request, number, moment, everybody):
        """Kill a controller, the daemon and QEMU with it or not; return whether it came to that."""
        others = [_daemon(self.matrix.host), self.domain.pid] if everybody else []
        dying = asyncio.ensure_future(
            self.matrix.graveyard.control(self.domain, request, number, moment, others)
        )
        while everybody and not dying.done():
            try:
                self.seen = await self.domain.guest.progress()
            except GuestError:  # its line closed: it is dead
                break
        died, _ = await dying
        if died and everybody:
            for left in (self.directory / "t").iterdir():  # as a host does that starts again
                shutil.rmtree(left)
            self.matrix.host.kill()
            self.matrix.host.start()
            await self.domain.is_off()
        return died

    async def recovered(self):
        """Recover; nothing is left to recover then."""
        async with qmpblock.connect(self.domain.monitor_path) as vm:
            await vm.recover()
            assert await vm.recover() == [], self.label

    async def again(self):
        """Do the same again, unless it was done; then it is as documented."""
        with contextlib.suppress(Error):  # a snapshot whose file is there: `is_done` says
            await run(self.domain.monitor_path, self.operation.request(self.images))
        await self.recovered()
        await self.is_done()

    async def starts_again(self):
        """Have libvirt start it from what it remembers, after its QEMU died, and look at that."""
        _, image = await self.domain.chains()
        self.content = await self._holds(image, self.seen.flushed, self.seen.issued + 100_000)
        await self.domain.start()
        now, _ = await self.domain.chains()
        for file in self.images.glob("new-*"):  # an overlay: once libvirt was asked, it is left
            if file.name not in now:
                file.unlink()
        self.started_again = True
        self.spec = dataclasses.replace(self.spec, offset=6 << 20)  # zeros, as what was there was
        await self._let_write()

    async def _let_write(self):
        await self.domain.guest.stress(self.spec)
        self.seen = await self.guest_moves("flushed")

    # judging

    async def settled(self):
        """See that libvirt and QEMU agree, nothing of ours is left, and no write is lost."""
        domain = self.domain
        await self.guest_moves()
        later = await self.agree()
        await self._is()
        await self.libvirt_goes_on()
        starts = self.matrix.count % 2 == 0
        if not starts and version_of(self.matrix.qemu) < (11, 0, 0):  # else 9.0 cannot save
            await domain.save_and_restore(self.directory / "saved")
            await self.guest_moves()
        done = await domain.guest.stop_stress()
        assert (done.bad, done.errors) == (0, 0), done
        assert await domain.guest.check() > 0
        await domain.virsh("destroy")
        await self.images_hold(later, done.acked, done.issued)
        known = {path.name for path in self.matrix.built.directory.iterdir()}
        files = {path.name for path in self.images.iterdir()} - known - {later.name}
        assert not files, f"{self.label}: {files}"
        if starts:
            await domain.start()

    async def agree(self):
        """See that libvirt has the chain that QEMU has; return the image of the next start."""
        now, later = await self.domain.chains()
        async with qmpblock.connect(self.domain.monitor_path) as vm:
            chain = (await vm.disk("vda")).chain
        assert tuple(Path(layer.file).name for layer in chain.layers) == now, self.label
        assert later.name == now[0], self.label
        assert not (await self.domain.virsh("blockjob", "vda")).strip(), self.label
        return later

    async def libvirt_goes_on(self):
        """Have libvirt take a snapshot of its own, and take it back; back the disk up; and pull."""
        before = await self.domain.chains()
        await self.domain.virsh("snapshot-create-as", "--disk-only", "--no-metadata", "later")
        await self.domain.virsh("blockcommit", "vda", "--shallow", "--active", "--pivot")
        assert await self.domain.chains() == before, self.label
        before[1].with_suffix(".later").unlink()
        await self.guest_moves()
        await self._backs_up()
        if before[0][1:]:
            await self.domain.virsh("blockpull", "vda", "--wait")
            assert await self.domain.chains() == (before[0][:1], before[1]), self.label
            await self.guest_moves()

    async def _backs_up(self):
        """See that a backup by libvirt has whatever the guest was told of before."""
        told, before = await self.domain.guest.progress(), set(self.images.iterdir())
        await self.domain.virsh("backup-begin")
        async with asyncio.timeout(_STALL):
            while "None" not in await self.domain.virsh("domjobinfo"):
                await asyncio.sleep(0.05)
        later = await self.domain.guest.progress()
        [backup] = set(self.images.iterdir()) - before
        await self._holds(backup, told.acked, later.issued)
        backup.unlink()

    async def images_hold(self, image, acked, issued):
        """See that a domain that was ended has all in the image that libvirt starts it from."""
        # What was left of a QEMU that died must not harm what its successor has written.
        await qmpblock.recover_images([self.domain.image])
        assert not list((self.directory / "state").glob("*.journal")), self.label
        await self._holds(image, acked, issued)

    async def _is(self):
        """See that the VM is as before, or as after the operation."""
        deadline = asyncio.get_running_loop().time() + _SETTLE
        wanted = [one for one in (self.before, self.matrix.after) if one is not None]
        while True:
            now = await self.state()
            if now in wanted or self.matrix.after is None:
                break
            if asyncio.get_running_loop().time() > deadline:
                least = min((difference(one, now) for one in wanted), key=len)
                raise AssertionError(f"{self.label}: not as it should be:\n" + "\n".join(least))
            await asyncio.sleep(0.05)
        assert not [line for line in now.lines if "qmpblock-" in line], self.label

    async def _holds(self, image, acked, issued):
        """See that a closed image has every write, and all else as it was; return what it has."""
        fmt = "raw" if image.suffix == ".raw" else "qcow2"
        data = await self.matrix.content_of(image, fmt)
        area = slice(self.spec.offset, self.spec.offset + self.spec.length)
        verdict = check_acknowledged(data[area], self.spec, acked, issued)
        assert verdict.ok, f"{self.label}: {image.name}: {verdict}"
        grown = len(data) - len(self.content)
        assert data[: area.start] == self.content[: area.start], self.label
        assert data[area.stop :] == self.content[area.stop :] + bytes(grown), self.label
        return data


class Matrix:
    """All that is killed of one operation. `async with`."""

    point_class = Point

    def __init__(self, host, operation, directory, qemu):
        self.host, self.operation, self.qemu = host, operation, qemu
        self.directory = directory / operation.name
        self.tools = Tools.of(qemu)
        self.graveyard = Graveyard()
        self.count = 0
        self.after = None

    async def __aenter__(self):
        scenario = parse_scenario(self.operation.scenario, self.operation.name)
        self.built = await build(scenario, self.directory / "template", self.tools)
        [disk] = self.built.disks
        self.content = await self.content_of(disk.active.path, disk.active.spec.format)
        await self.graveyard.__aenter__()
        try:
            async with self.point("the whole operation") as point:
                request = self.operation.request(point.images)
                died, self.trace = await self.graveyard.control(point.domain, request)
                assert not died
                await point.is_done()
                self.after = await point.state()
        except BaseException:
            await self.graveyard.__aexit__()
            raise
        return self

    async def __aexit__(self, *_):
        await self.graveyard.__aexit__()

    def point(self, label):
        self.count += 1
        return self.point_class(self, f"{self.operation}, {label}")

    def kills(self):
        """Return (number, moment, victim) of every kill.

        A daemon that dies as a disk pivots may lose the domain (K41): that is looked at elsewhere.
        """
        pivots = range(0)
        if self.operation.name.startswith(("pivot", "move")):
            pivots = range(len(self.trace) + 1)
        elif "block-commit" in self.trace:  # of a staged commit; what comes after it goes home
            pivots = range(self.trace.index("block-commit"), len(self.trace) + 1)
        return [
            (number, moment, victim)
            for number, moment in self.points()
            for victim in VICTIMS
            if number not in pivots or victim not in ("daemon", "all")
        ]

    def points(self):
        """Return (number, moment) from the first change on, of what takes a lock for it."""
        locks = [n for n, sent in enumerate(self.trace, 1) if sent.startswith("object-add")]
        numbers = range(locks[0] if locks else 1, len(self.trace) + 1)
        return [(n, when) for n in numbers for when in MOMENTS]

    async def content_of(self, path, fmt):
        """Return what a guest reads from a closed image, its chain opened as recorded."""
        raw = self.directory / "content.raw"
        await self.tools.run(self.tools.img, "convert", "-f", fmt, "-O", "raw", str(path), str(raw))
        return raw.read_bytes()

    async def killed(self, number, moment, victim):
        """Kill at a point, and see what libvirt and the guest have; return whether it came to it.

        An operation may send less than when its commands were counted.
        """
        async with self.point(f"{victim} killed {moment} command {number}") as point:
            request = self.operation.request(point.images)
            if victim in ("daemon", "qemu"):
                died = await point.strike(request, number, moment, victim)
            else:
                died = await point.die(request, number, moment, victim == "all")
            if died and victim in ("qemu", "all"):
                await point.starts_again()
            if victim == "controller-undo":
                await point.recovered()
            else:
                await point.again()
            await point.settled()
        return died


def _daemon(host):
    return int((host.socket.parent / "libvirtd.pid").read_text())


async def kill_all(host, operation, directory, qemu):
    """Kill each at every point; all slices of `make soak` together try them all."""
    chosen, tried = slice_of_soak(), 0
    async with Matrix(host, operation, directory, qemu) as matrix:
        kills = matrix.kills()
        for number, kill in enumerate(kills):
            if chosen(number):
                tried += await matrix.killed(*kill)
    print(f"kill matrix: {tried} of {len(kills)} points, {operation} under libvirt")


async def kill_some(host, operations, count, directory, qemu):
    """Kill at some points of one of the operations; return at how many it came to that."""
    _, chance = rounds(1)
    operation, tried = chance.choice(operations), 0
    async with Matrix(host, operation, directory, qemu) as matrix:
        kills = matrix.kills()
        for kill in chance.sample(kills, len(kills)):
            tried += await matrix.killed(*kill)
            if tried == count:
                break
    print(f"kill matrix: {tried} of {len(kills)} points, {operation} under libvirt")
    return tried
