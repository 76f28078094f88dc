"""Kill matrices of backups: the operations, for `killing.Matrix`."""

import asyncio
import dataclasses
import hashlib
import shutil

from fleecing import ran
from killing import AREA, CHAIN, IOTHREAD, TWO, Operation

import qmpblock
from qmpblock import names
from qmpblock.backups import read_points, restore
from qmpblock.testing.stamps import StressSpec, check_point_in_time

_AGAIN = 6 << 20  # where the guest of a VM that was started anew writes: zeros up to then
_BITMAP = r"bitmap: (qmpblock-backup-\S+) of "


class BackingUp(Operation):
    """A backup after another one, in a directory beside that of the images.

    What the next one makes of what was left is looked at, too: it is where the killed one shows.
    """

    @property
    def moves(self):
        """Never: what it puts in the guest's way comes home."""
        return False

    @property
    def leaves_nodes(self):
        return False

    @property
    def stays(self):
        """Its bitmaps, which are those of the last backup (`check_settled`)."""
        return _BITMAP

    def place(self, directory):
        return directory.parent / "backups"

    async def begin(self, address, directory):
        """Make the backup that this one is an increment of, unless it is to be the first."""
        if not self.what["first"]:
            await self.back_up(address, directory)

    async def back_up(self, address, directory):
        async with qmpblock.connect(address) as controller:
            disks = [await controller.disk(disk) for disk in self.what["disks"]]
            async with controller.backup(self.place(directory), disks) as job:
                pass
        return job.result

    async def check_done(self, address, directory):
        made = len(read_points(self.place(directory))) - (not self.what["first"])
        assert made in (1, 2)  # done again, though it had been done

    async def check_kept(self, point, bounds):
        """Restore every backup: it is the disks as they were at one instant, and when it was."""
        place = self.place(point.images)
        points = read_points(place) if place.exists() else ()
        for number, one in enumerate(points):
            target = place.parent / f"restored-{number}"
            restored = await restore(place, target, at=one.when)
            for disk, made in enumerate(restored.disks):
                data = await point.matrix.content_of(made.target, made.format)
                if number == 0 and not self.what["first"]:  # `begin` made it before any write
                    assert data == point.matrix.content[disk], made.target
                else:
                    _check_instant(data, _spec(disk), bounds[disk], made.target)
            shutil.rmtree(target)

    async def check_settled(self, vm, directory):
        """See that the bitmaps are those of the last backup, and that the next one is right."""
        place, count = self.place(directory), len(self.what["disks"])
        points = read_points(place) if place.exists() else ()
        assert await self.bitmaps(vm) == sorted(points[-1:] and _bitmaps(points[-1], count))
        made, bounds = await self.next_one(vm, place, "incremental" if points else "full")
        for number, one in enumerate(made.disks):
            _check_instant(await _content(place, one), _spec(number), bounds[number], one)
        self.check_tidy(directory)

    async def check_restarted(self, point):
        """See that the next backup of a VM that is started anew is right.

        It is full, but for a disk that was frozen when QEMU died: its image holds its bitmaps since
        then, and these had noted what `recover` brought home.
        """
        place = self.place(point.images)
        directory = point.directory / "again"
        directory.mkdir()
        async with point.started_from(directory) as vm:
            specs = [
                dataclasses.replace(_spec(number), offset=_AGAIN, seed=number + 11)
                for number, _ in enumerate(self.what["disks"])
            ]
            for spec in specs:
                await vm.guest.stress(spec)
                while not (await vm.guest.progress(spec.disk)).acked:
                    await asyncio.sleep(0.005)
            made, bounds = await self.next_one(vm, place)
            for spec in specs:
                await vm.guest.stop_stress(spec.disk)
            await vm.quit()
        for number, one in enumerate(made.disks):
            data = await _content(place, one)
            _check_instant(data, specs[number], bounds[number], one)
            active = point.built[number].active
            now = await point.matrix.content_of(active.path, active.spec.format)
            assert data[:_AGAIN] == now[:_AGAIN], one  # nobody writes to it any more
        self.check_tidy(point.images)

    async def next_one(self, vm, place, wanted=None):
        """Make the next backup; return it, and between which of the guest's writes it is.

        :param wanted: `full` or `incremental`; None: either.
        """
        count = len(self.what["disks"])
        async with qmpblock.connect(vm.monitor_path) as controller:
            disks = [await controller.disk(disk) for disk in self.what["disks"]]
            making = controller.backup(place, disks)
            async with vm.guest.bounds(*range(count)) as bounds:
                job = await making.__aenter__()
            await making.__aexit__(None, None, None)
        made = job.result.point
        if wanted is not None:
            assert [one.kind for one in made.disks] == [wanted] * count, job.result.warnings
        assert await self.bitmaps(vm) == sorted(_bitmaps(made, count))
        return made, bounds

    async def bitmaps(self, vm):
        nodes = await vm.execute("query-named-block-nodes", flat=True)
        return sorted(
            (node["node-name"], one["name"])
            for node in nodes
            for one in node.get("dirty-bitmaps", ())
            if "name" in one
        )

    def check_tidy(self, directory):
        """See that nothing of a backup that was broken off is left, once another one was made."""
        place = self.place(directory)
        points = read_points(place)
        known = {one.file for point in points for one in point.disks}
        known |= {names.point_file(point.when) for point in points} | {names.BACKUP_LOCK_FILE}
        assert {path.name for path in place.iterdir()} == known

    def check_left(self, directory):
        """See that what says that it is made is all there, whoever died."""
        place = self.place(directory)
        for point in read_points(place) if place.exists() else ():
            for one in point.disks:
                data = (place / one.file).read_bytes()
                assert hashlib.blake2b(data, digest_size=32).hexdigest() == one.digest, one.file


def _spec(disk):
    """Return what the guest does to a disk (`killing`)."""
    return StressSpec(disk=disk, seed=disk + 1, flush_every=64, read_percent=20, **AREA)


def _check_instant(data, spec, bounds, what):
    found = check_point_in_time(data[spec.offset : spec.offset + spec.length], spec, bounds)
    assert found.ok, (what, found)


async def _content(place, one):
    """Return what a guest would read from the image of a backup, by qemu-img alone."""
    raw = place.parent / "content.raw"
    code, out = await ran(
        *("qemu-img", "convert", "-f", "qcow2", "-O", "raw", place / one.file, raw)
    )
    assert code == 0, out
    data = raw.read_bytes()
    raw.unlink()
    return data


def _bitmaps(point, count):
    every = [names.backup_bitmap(point.backups, point.id, number) for number in range(count)]
    kinds = (str, names.end_bitmap, names.open_bitmap)
    return [(f"d{n}", kind(every[n])) for n in range(count) for kind in kinds]


def _operations():
    chain = ("d0-3.qcow2", "d0-2.qcow2", "d0-1.qcow2", "d0-0.raw")
    two = (("d0-1.qcow2", "d0-0.raw"), ("d1-0.qcow2",))
    one = {"do": "backup", "directory": "{}/../backups", "disks": ["vd0"], "first": False}
    plain, iothread = CHAIN.format(attach=""), CHAIN.format(attach=IOTHREAD)
    yield BackingUp("backup", plain, one, (chain,))
    yield BackingUp("backup-first", plain, one | {"first": True}, (chain,))
    yield BackingUp("backup-iothread", iothread, one, (chain,))
    yield BackingUp("backup-of-two", TWO.format(), one | {"disks": ["vd0", "vd1"]}, two)


BACKUPS = tuple(_operations())
