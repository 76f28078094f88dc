"""Migrations by chance, of disks to which the guest writes throughout: rounds of it.

A round draws one, two or eight disks of any sort, as a round of copies does, how their images
are at the destination, and whether a storage daemon has them. Everything of it follows from its
seed. What the guest was told is written must be there, beside it each image must be what the
source's was, and no fuller than that.
"""

import asyncio
import random
import shutil
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace

from copyrounds import KINDS, Round

import qmpblock
from qmpblock.testing.images import Tools, build
from qmpblock.testing.stamps import check_acknowledged

_CLUSTER = 65536  # of an image that is made for the destination


@dataclass
class Outcome:
    """What some rounds did, to be printed.

    :ivar stood: of each round, for how long the guest did, in seconds.
    """

    disks: int = 0
    writes: int = 0
    stood: list[float] = field(default_factory=list)

    def __str__(self):
        most = max(self.stood, default=0.0)
        return (
            f"{len(self.stood)} rounds, {self.disks} disks, {self.writes} writes, the guest stood "
            f"for {most * 1e3:.1f} ms at the most"
        )


async def migrations_under_stress(
    start_qemu, start_destination, directory, qemu, version, chance, count, here=(), there=()
):
    """Do so many rounds, each with two VMs of its own; return what came of them.

    :param here: options of the source; `there`: of the destination.
    """
    outcome = Outcome()
    for number in range(count):
        one = Passing(chance.getrandbits(32), version)
        room = directory / f"round{number}"
        room.mkdir()
        try:
            one.tools, one.room = Tools.of(qemu), room
            await one.pass_over(start_qemu, start_destination, outcome, dict(here), dict(there))
        except BaseException as error:
            error.add_note(f"round {number}: {one}")
            raise
        shutil.rmtree(room)
        print(f"round {number}: {one}; stood {outcome.stood[-1] * 1e3:.1f} ms", flush=True)
    return outcome


class Passing(Round):
    """One migration of one VM.

    :param version: of the source's QEMU: what it does not survive, and is refused, is not drawn.
    """

    def __init__(self, seed, version):
        super().__init__(seed, version, KINDS)
        secret = any("luks" in disk.kind for disk in self.disks)
        chance = random.Random(seed)
        self.image = chance.choice([None] if secret else [None, "qcow2", "raw"])
        self.daemon = chance.random() < 0.3

    def __str__(self):
        kinds = ", ".join(f"{one.kind} ({one.how})" for one in self.disks)
        way = ", by a storage daemon" if self.daemon else ""
        return f"seed {self.seed}: to {self.image or 'the same format'}{way}, of {kinds}"

    async def pass_over(self, start_qemu, start_destination, outcome, here, there):
        """Do it, and see what came of it."""
        built = await build(self.scenario, self.room / "images", self.tools)
        self.built = [built.disk(f"d{number}") for number in range(len(self.disks))]
        self.digests = [
            await self._digest(disk.active, one.area)
            for disk, one in zip(self.built, self.disks, strict=True)
        ]
        source = await start_qemu(built, guest=True, **here)
        destination = await start_destination(source, image=self.image, **there)
        numbers = [await source.io.guest_number(disk) for disk in self.built]
        self.specs = [replace(o.spec, disk=n) for o, n in zip(self.disks, numbers, strict=True)]
        for spec in self.specs:
            await source.guest.stress(spec)
        for spec in self.specs:
            await self._some_writes(source, spec.disk)
        async with asyncio.timeout(300):
            result = await _migrated(source, destination, storage_daemon=self.daemon)
        assert result.warnings == ()
        await destination.attach_guest()
        self.ends = []
        for spec in self.specs:
            await self._some_writes(destination, spec.disk)
            done = await destination.guest.stop_stress(spec.disk)
            assert (done.bad, done.errors) == (0, 0), done
            assert await destination.guest.check(spec.disk) > 0
            self.ends.append(done)
        assert await destination.execute("query-jobs") == []
        await source.quit()
        await destination.quit()
        await self._see(destination.disks)
        outcome.disks += len(self.disks)
        outcome.writes += sum(done.acked for done in self.ends)
        outcome.stood.append(result.downtime)

    async def _see(self, disks):
        """See that nothing is lost, that the rest is as it was, and that no image has swollen."""
        for number, (spec, old, new) in enumerate(zip(self.specs, self.built, disks, strict=True)):
            done, image = self.ends[number], new.active
            data = await self._content(image, number)
            verdict = check_acknowledged(
                data, spec, done.acked, done.issued, background=self.background
            )
            assert verdict.ok, f"{image.path}: {verdict}"
            await image.check(self.tools)
            held, pieces = await self._held(old.active)
            most = held + spec.length + 2 * _CLUSTER * (pieces + 2)
            now, _ = await self._held(image)
            assert now <= most, f"{image.path}: {now} bytes of data, of {held} at the source"

    async def _held(self, image):
        """Return how many bytes of data a closed chain has, and in how many pieces."""
        data = [one for one in await image.map(self.tools) if one["data"]]
        return sum(one["length"] for one in data), len(data)


async def _migrated(source, destination, **options):
    async with AsyncExitStack() as stack:
        one, other = [
            await stack.enter_async_context(qmpblock.connect(vm.monitor_path))
            for vm in (source, destination)
        ]
        async with qmpblock.migrate(one, other, **options) as job:
            pass
    return job.result
