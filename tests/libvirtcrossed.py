"""What libvirt is asked for in the midst of an operation of ours, before each change that it makes.

It is refused, waits, or is right, and so is ours: afterwards libvirt and QEMU agree, nothing of
ours is left, and no write of the guest's is lost in the image that libvirt starts the domain from.
"""

import asyncio
import contextlib
from collections import Counter
from dataclasses import dataclass

from allocatekills import DECISIVE
from dying import ASKED, deadly, run
from libvirtkills import COMMITS, MOVES, OPERATIONS, Matrix, Point
from rounds import rounds, slice_of_soak

import qmpblock
from qmpblock.errors import Error
from qmpblock.testing.images import Tools

_PATIENCE = 5.0  # seconds that ours stands still for libvirt's; then that waits for ours, perhaps
_CHANGES = (*DECISIVE, "getfd", "closefd", "nbd-server-", ASKED)


@dataclass(frozen=True)
class Theirs:
    """What libvirt is asked for, as words of virsh.

    :ivar then: what is due when it was done, and ours is over.
    :ivar ends: how the domain comes back, where it does not run when that was done.
    """

    name: str
    asked: tuple[tuple[str, ...], ...]
    then: tuple[tuple[str, ...], ...] = ()
    ends: str = ""

    def __str__(self):
        return self.name


def _theirs():
    snapshot = ("snapshot-create-as", "--disk-only", "--no-metadata", "theirs")
    middle = ("blockcommit", "vda", "--top", "vda[2]", "--base", "vda[3]", "--wait")
    spare = ("attach-disk", "{spare}", "vdb", "--subdriver", "qcow2", "--targetbus", "virtio")
    yield Theirs("snapshot", (snapshot,))
    yield Theirs("pivot", (("blockcommit", "vda", "--shallow", "--active", "--pivot"),))
    yield Theirs("commit", (middle,))
    yield Theirs("pull", (("blockpull", "vda", "--wait"),))
    yield Theirs("backup", (("backup-begin",),))
    yield Theirs("save", (("save", "{saved}"),), ends="restore")
    yield Theirs("managedsave", (("managedsave",),), ends="resume")
    yield Theirs("attach", (spare,), then=(("detach-disk", "vdb"),))
    yield Theirs("attach-detach", (spare, ("detach-disk", "vdb")))
    yield Theirs("resize", (("blockresize", "vda", "12M"),))
    yield Theirs("suspend", (("suspend",),), then=(("resume",),))
    yield Theirs("suspend-resume", (("suspend",), ("resume",)))
    yield Theirs("destroy", (("destroy",),), ends="start")
    yield Theirs("shutdown", (("shutdown",),), ends="start")


THEIRS = tuple(_theirs())
#: A kind of each: the iothread is no other to libvirt. Of `full`, which takes long, tests/soak.
EVERY = tuple(one for one in (*OPERATIONS, *COMMITS, *MOVES) if "iothread" not in one.extra)


class Crossing(Point):
    """A domain of which both want something at once.

    :ivar held: whether ours held the domain, or was just about to, as libvirt was asked.
    """

    held = False

    async def meet(self, number, moment, theirs):
        """Run ours, and theirs at a point; return why each was refused.

        Of theirs None where ours never came to that point.
        """
        asking, sent = [], []

        async def meet():
            self.seen = await self.domain.progress(self.seen)
            self.held = sent[-1] == ASKED or not await self._runs()
            asking.append(asyncio.ensure_future(self._ask(theirs)))
            await asyncio.wait(asking, timeout=_PATIENCE)

        @contextlib.asynccontextmanager
        async def connect(address):
            async with qmpblock.connect(address) as vm:
                deadly(vm.monitor, number, moment, meet, sent)
                yield vm

        ours = ""
        try:
            await run(self.domain.monitor_path, self.operation.request(self.images), connect)
        except Error as error:
            ours = error.message
        return ours, (await asking[0] if asking else None)

    async def _ask(self, theirs):
        """Ask for it; return why it was refused."""
        try:
            for words in theirs.asked:
                await self._virsh(*words)
        except AssertionError as error:  # what virsh said
            return str(error).partition("\nassert")[0]
        if theirs.name == "shutdown":
            await self.domain.is_off()
        return ""

    async def _runs(self):
        return "running" in await self.domain.virsh("domstate")

    async def _virsh(self, verb, *words):
        spare, saved = self.directory / "spare.qcow2", self.directory / "saved"
        if verb == "attach-disk":
            tools = Tools.of(self.matrix.qemu)
            await tools.run(tools.img, "create", "-q", "-f", "qcow2", str(spare), "1M")
        words = [word.format(spare=spare, saved=saved) for word in words]
        asked = asyncio.ensure_future(self.domain.virsh(verb, *words))
        while verb == "detach-disk" and not asked.done():
            await self.domain.guest.eject()
            await asyncio.wait({asked}, timeout=0.05)
        await asked

    async def comes_back(self, theirs):
        """Do what is due after theirs was done."""
        if theirs.name == "suspend" and self.held and await self._runs():
            return  # libvirt does nothing to a domain that stands: nobody can see that it was asked
        for words in theirs.then:
            await self._virsh(*words)
        if theirs.ends == "start":
            await self.starts_again()
        elif theirs.ends:
            self.started_again = True
            words = ("restore", str(self.directory / "saved")) if theirs.ends == "restore" else ()
            await self.domain.goes_on(*(words or ("start", self.domain.name)))

    async def _lower_ours(self):
        """Commit an overlay of ours that theirs came to lie upon, as our words propose."""
        now, _ = await self.domain.chains()
        for name in now[1:]:
            if "qmpblock-" in name:
                async with qmpblock.connect(self.domain.monitor_path) as vm:
                    disk = await vm.disk("vda")
                    below = str(self.images / now[now.index(name) + 1])
                    async with disk.commit(top=str(self.images / name), base=below):
                        pass
                (self.images / name).unlink()

    async def settled(self):
        """See that all agree, nothing of ours is left, and no write is lost."""
        domain = self.domain
        while "None" not in await domain.virsh("domjobinfo"):  # a backup
            await asyncio.sleep(0.05)
        await self.guest_moves()
        await self._lower_ours()
        later = await self.agree()
        now = await self.state()
        left = [line for line in now.lines if "qmpblock-" in line and later.name not in line]
        assert not left, f"{self.label}: {left}"
        await self.libvirt_goes_on()
        done = await domain.guest.stop_stress()
        assert (done.bad, done.errors) == (0, 0), done
        assert await domain.guest.check() > 0
        await domain.virsh("destroy")
        await self.images_hold(later, done.acked, done.issued)
        ours = [path for path in self.images.iterdir() if "qmpblock-" in path.name]
        # What they have backed up is called after the layer; what they have pulled into is theirs.
        ours = [path for path in ours if not path.suffix.removeprefix(".").isdigit()]
        assert ours in ([], [later]), f"{self.label}: {ours}"


class Crossings(Matrix):
    """All that libvirt is asked for in the midst of one operation. `async with`."""

    point_class = Crossing

    def meetings(self):
        """Return (number, moment, theirs) before each change, and at the end."""
        every = list(enumerate(self.trace, 1))
        numbers = [n for n, sent in every if sent.startswith(_CHANGES)] or [n for n, _ in every]
        points = [*((number, "before") for number in numbers), (numbers[-1], "after")]
        return [(*point, theirs) for point in points for theirs in THEIRS]

    async def met(self, number, moment, theirs):
        """Ask libvirt at a point; return what came of both."""
        async with self.point(f"{theirs} {moment} command {number}") as point:
            ours, refused = await point.meet(number, moment, theirs)
            if refused == "":
                await point.comes_back(theirs)
            await point.recovered()
            await point.settled()
            if refused is None:
                return None
            return ("theirs refused" if refused else "theirs done"), (
                "ours given up" if ours else "ours done"
            )


async def cross_all(host, operation, directory, qemu):
    """Ask for everything at every point; all slices of `make soak` together do."""
    chosen, seen = slice_of_soak(), Counter()
    async with Crossings(host, operation, directory, qemu) as matrix:
        meetings = matrix.meetings()
        for number, meeting in enumerate(meetings):
            if chosen(number):
                seen[str(meeting[-1]), await matrix.met(*meeting)] += 1
    for one, count in sorted(seen.items(), key=str):
        print(f"{operation} and {one[0]}: {one[1]}, {count} times")
    print(f"crossings: {seen.total()} of {len(meetings)} points, {operation} under libvirt")


async def cross_some(host, operations, count, directory, qemu):
    """Ask for something at some points of one operation; return at how many it came to that."""
    _, chance = rounds(1)
    operation, tried = chance.choice(operations), 0
    async with Crossings(host, operation, directory, qemu) as matrix:
        meetings = matrix.meetings()
        for meeting in chance.sample(meetings, len(meetings)):
            tried += await matrix.met(*meeting) is not None
            if tried == count:
                break
    print(f"crossings: {tried} tried, {operation} under libvirt")
    return tried
