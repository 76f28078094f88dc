"""Somebody else changes a chain between our look at it and a command of ours: at every command.

A matrix is generated. One run to the end tells the commands of a verb. Then, for each of them, a
fresh VM whose guest writes all the time, in which somebody on another monitor strikes right before
that command. What must hold is in `Crossing.complaints`: QEMU lives, no write is lost, nothing of
ours is left, and what we say was done is right.
"""

import asyncio
import contextlib
import json
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from dying import deadly, run
from killing import AREA, CHAIN, SHORT, TWO, have_own_places
from rounds import rounds, slice_of_soak

import qmpblock
from qmpblock.backups import read_points, restore
from qmpblock.errors import CommandError, Error
from qmpblock.testing.images import Tools, build
from qmpblock.testing.qemu import QemuProcess
from qmpblock.testing.scenario import parse_scenario
from qmpblock.testing.stamps import Bounds, StressSpec, check_acknowledged, check_point_in_time

_STALL = 20.0  # seconds without a write of the guest's that count as a hang
_LONGEST = 60.0  # seconds for one of ours
#: How the disks are attached: with files that are nodes of their own, as libvirt has them; with
#: files that are part of their images' nodes; or the first below a throttle.
WAYS = ("apart", "inline", "throttled")


@dataclass(frozen=True)
class Verb:
    """One of ours.

    :ivar what: the request of dying.py; `{}` in file names stands for the images' directory.
    :ivar first: likewise, what was done before, undisturbed.
    :ivar makes: copies, each as (file, format, disk), the file relative to the point's directory.
    """

    name: str
    scenario: str
    what: dict
    first: dict | None = None
    makes: tuple = ()

    def __str__(self):
        return self.name

    @property
    def leaves_nodes(self):
        """Whether nodes of ours are in the guest's chains afterwards."""
        return self.what["do"] == "snapshot" or self.what.get("at") == "pivot"


def _verbs():
    plain, short, two = CHAIN.format(attach=""), SHORT.format(attach=""), TWO.format()
    raw, layer = "{}/d0-0.raw", "{}/d0-%d.qcow2"
    allocate, stream, commit = (
        {"do": do, "disk": "vd0"} for do in ("allocate", "stream", "commit")
    )
    yield Verb("map", plain, {"do": "map", "disk": "vd0"})
    yield Verb("thin", plain, allocate)
    yield Verb("full", plain, allocate | {"full": True})
    yield Verb("independent", plain, allocate | {"independent": True})
    every = {"backing": "independent", "allocation": "full"}
    yield Verb("apply", plain, {"do": "apply", "disks": [{"disk": "vd0", **every}]})
    yield Verb("stream", plain, stream)
    yield Verb("stream-base", plain, stream | {"base": layer % 1})
    yield Verb("stream-hidden", short, stream | {"base": raw})
    yield Verb("stream-middle", plain, stream | {"top": layer % 2, "base": raw})
    yield Verb("commit", plain, commit | {"base": layer % 1})
    yield Verb("commit-raw", plain, commit)
    yield Verb("commit-middle", plain, commit | {"top": layer % 2, "base": layer % 1})
    yield Verb("commit-hidden", short, commit | {"top": layer % 1, "base": raw})
    new = {"vd0": "{}/new-0.qcow2"}
    yield Verb("snapshot", plain, {"do": "snapshot", "overlays": new})
    both = new | {"vd1": "{}/new-1.qcow2"}
    yield Verb("snapshot-of-two", two, {"do": "snapshot", "overlays": both})
    yield from _copies(plain, two)
    backup = {"do": "backup", "directory": "{}/../backups", "disks": ["vd0"]}
    yield Verb("backup", plain, backup)
    yield Verb("backup-again", plain, backup, first=backup)
    backup |= {"disks": ["vd0", "vd1"]}
    yield Verb("backup-again-of-two", two, backup, first=backup)
    words = ["sh", "-c", "cat > {}/../c0.raw"]
    export = {"do": "export", "disks": ["vd0"], "words": words, "stdin": True}
    yield Verb("export", plain, export, makes=(("c0.raw", "raw", 0),))


def _copies(plain, two):
    one, made = {"vd0": "{}/../c0.qcow2"}, (("c0.qcow2", "qcow2", 0),)
    for at in ("start", "end"):
        copy = {"do": "copy", "at": at, "force": True, "targets": one}
        yield Verb(f"copy-{at}", plain, copy, makes=made)
        yield Verb(f"copy-{at}-verified", plain, copy | {"verify": True}, makes=made)
        there = {"targets": {"vd0": "{}/c0.qcow2"}, "layers": "top"}
        yield Verb(f"copy-{at}-top", plain, copy | there, makes=(("images/c0.qcow2", "qcow2", 0),))
        both = copy | {"targets": one | {"vd1": "{}/../c1.qcow2"}}
        yield Verb(f"copy-{at}-of-two", two, both, makes=(*made, ("c1.qcow2", "qcow2", 1)))
    pivot = {"do": "copy", "at": "pivot", "format": "qcow2"}
    there = {"vd0": "{}/c0.qcow2"}
    yield Verb("pivot", plain, pivot | {"targets": there})
    yield Verb("pivot-raw", plain, pivot | {"format": "raw", "targets": {"vd0": "{}/c0.raw"}})
    yield Verb("pivot-top", plain, pivot | {"targets": there, "layers": "top"})
    yield Verb("pivot-of-two", two, pivot | {"targets": there | {"vd1": "{}/c1.qcow2"}})


VERBS = tuple(_verbs())


def verb(name):
    """Return the verb of that name."""
    return next(one for one in VERBS if one.name == name)


@dataclass(frozen=True)
class Met:
    """What came of one point.

    :ivar theirs: what somebody did, or why not; None where ours never came to that command.
    :ivar ours: why ours was given up; empty where it was done.
    :ivar chains: the file names of each disk's layers.
    """

    theirs: str | None
    ours: str
    chains: list


class Crossing:
    """One VM, from its start to the last look at its images. `async with`."""

    def __init__(self, matrix, label):
        self.matrix = matrix
        self.label = label
        self.directory = matrix.directory / str(matrix.count)
        self.images = self.directory / "images"
        self.theirs = None

    async def __aenter__(self):
        have_own_places(self.directory)
        made = str(self.matrix.built.directory)
        await self.matrix.tools.run("cp", "-R", "--sparse=always", made, str(self.images))
        self.vm = QemuProcess(
            guest=True, qemu=self.matrix.qemu, directory=self.directory, extra=self._options()
        )
        self.specs = [
            StressSpec(disk=number, seed=number + 1, flush_every=64, read_percent=20, **AREA)
            for number, _ in enumerate(self.matrix.built.disks)
        ]
        try:
            await self.vm.start()
            if self.matrix.verb.first is not None:
                await self.run(self.matrix.verb.first)
            for spec in self.specs:
                await self.vm.guest.stress(spec)
            await self.guest_moves("flushed")
            self.first = await self._progress()
        except BaseException:
            await self.vm.close()
            raise
        return self

    async def __aexit__(self, kind, error, trace):
        if error is not None:
            error.add_note(f"at the point: {self.label}")
            error.add_note(self.vm.evidence())
        await self.vm.close()
        shutil.rmtree(self.directory, ignore_errors=True)

    def _options(self):
        found = []
        for number, disk in enumerate(self.matrix.built.disks):
            below = None
            for depth, image in reversed(list(enumerate(disk.active.chain()))):
                name = f"n{number}-{depth}"
                file = {"driver": "file", "filename": str(self.images / image.path.name)}
                node = {"driver": image.spec.format, "node-name": name, "file": file}
                node |= {"backing": below} if below else {}
                below = node
                if self.matrix.way != "inline":
                    found += ["-blockdev", json.dumps(file | {"node-name": f"file-{name}"})]
                    node["file"] = f"file-{name}"
                if self.matrix.way != "inline" or depth == 0:
                    found += ["-blockdev", json.dumps(node)]
                    below = name
            if self.matrix.way == "throttled":
                throttle = {"driver": "throttle", "node-name": f"t{number}", "file": below}
                found += ["-object", f"throttle-group,id=group{number}"]
                throttle["throttle-group"] = f"group{number}"
                found += ["-blockdev", json.dumps(throttle)]
                below = f"t{number}"
            found += ["-device", f"virtio-blk-pci,drive={below},id=vd{number}"]
        return found

    async def run(self, what, number=0, strike=None):
        """Do what a request says; return the commands that it took.

        :param strike: is awaited before command `number`.
        """
        trace = []

        @contextlib.asynccontextmanager
        async def connect(address):
            async with qmpblock.connect(address) as vm:
                deadly(vm.monitor, number, "before", strike, trace)
                yield vm

        request = json.loads(json.dumps(what).replace("{}", str(self.images)))
        async with asyncio.timeout(_LONGEST):
            await run(self.vm.monitor_path, request, connect)
        return trace

    async def guest_moves(self, what="acked"):
        """See that the guest's writes are acknowledged (or `flushed`) on every disk."""
        for number, first in enumerate(await self._progress()):
            deadline = asyncio.get_running_loop().time() + _STALL
            while True:
                seen = await self.vm.guest.progress(number)
                assert (seen.bad, seen.errors) == (0, 0), seen
                if getattr(seen, what) > getattr(first, what):
                    break
                assert asyncio.get_running_loop().time() < deadline, f"the guest hangs: {seen}"
                await asyncio.sleep(0.005)

    async def _progress(self):
        return [await self.vm.guest.progress(number) for number, _ in enumerate(self.specs)]

    # somebody else

    async def strike(self):
        """Have somebody take a snapshot of the first disk's image; it may be refused."""
        try:
            self.theirs = await self._snapshot()
        except CommandError as error:
            self.theirs = f"refused: {error.description}"

    async def _snapshot(self):
        execute, over = self.vm.execute, "n0-0"
        nodes = {one["node-name"]: one for one in await execute("query-named-block-nodes")}
        if over not in nodes:
            return f"refused: {over} is gone"
        tools, path = self.matrix.tools, self.images / "theirs.qcow2"
        below, image = nodes[over], ["-u", str(path), str(nodes[over]["image"]["virtual-size"])]
        if below["drv"] in ("qcow2", "raw"):
            image = ["-b", below["file"], "-F", below["drv"], *image]
        await tools.run(tools.img, "create", "-q", "-f", "qcow2", *image)
        file = {"driver": "file", "filename": str(path), "node-name": "theirs-file"}
        node = {"driver": "qcow2", "node-name": "theirs", "file": file, "backing": None}
        if self.matrix.way != "inline":
            await execute("blockdev-add", **file)
            node["file"] = "theirs-file"
        await execute("blockdev-add", **node)
        try:
            await execute("blockdev-snapshot", node=over, overlay="theirs")
        except CommandError:
            await execute("blockdev-del", node_name="theirs")
            if self.matrix.way != "inline":
                await execute("blockdev-del", node_name="theirs-file")
            path.unlink()
            raise
        return f"a snapshot of {over}"

    # the verdict

    async def complaints(self, ours):
        """Return what is not as it must be.

        :param ours: why ours was given up; empty where it was done.
        """
        await self.guest_moves()
        self.last = await self._progress()
        wrong = await self._left(ours)
        async with qmpblock.connect(self.vm.second_monitor_path) as controller:
            chains = [disk.chain for disk in await controller.disks()]
        layers = [[(layer.file, layer.format) for layer in chain.layers] for chain in chains]
        self.chains = [[Path(file).name for file, _ in chain] for chain in layers]
        ends = []
        for number, _ in enumerate(self.specs):
            ends.append(await self.vm.guest.stop_stress(number))
            assert (ends[-1].bad, ends[-1].errors) == (0, 0), ends[-1]
            assert await self.vm.guest.check(number) > 0
        await self.vm.quit()
        for number, chain in enumerate(layers):
            for how, opened in (("as it was open", _described(chain)), ("as named", chain[0])):
                data = await self._content(*opened)
                wrong += self._lost(data, number, ends[number], f"{self.chains[number]}, {how}")
        return wrong if ours else wrong + await self._not_made()

    async def _left(self, ours):
        """Return what of ours is left that should not be."""
        execute = self.vm.execute
        async with qmpblock.connect(self.vm.second_monitor_path) as controller:
            left = [str(one) for one in await controller.recover(dry_run=True)]
        nodes = [one["node-name"] for one in await execute("query-named-block-nodes", flat=True)]
        objects = [one["name"] for one in await execute("qom-list", path="/objects")]
        left += objects
        if ours or not self.matrix.verb.leaves_nodes:
            left += nodes
        left = [one for one in left if "qmpblock" in one]
        left += [one["id"] for one in await execute("query-jobs") if one["id"] != "theirs"]
        left += [one["id"] for one in await execute("query-block-exports")]
        files = [*self.images.iterdir(), *self.directory.iterdir()]
        files += (self.directory / "state").rglob("*.journal")
        for name in (file.name for file in files):
            kept = name.endswith(".partial") and f"{name}: the same copy with --resume" in ours
            if ("qmpblock" in name or name.endswith((".partial", ".journal"))) and not kept:
                left.append(name)
        return [f"left: {one}" for one in left]

    async def _not_made(self):
        """Return what is wrong with what ours has made."""
        wrong = []
        for name, fmt, disk in self.matrix.verb.makes:
            data = await self._content(str(self.directory / name), fmt)
            wrong += self._no_instant(data, disk, name)
        place, first = self.directory / "backups", self.matrix.verb.first
        points = read_points(place) if place.exists() else ()
        for number, one in enumerate(points):
            made = await restore(place, self.directory / f"restored-{number}", at=one.when)
            for disk, image in enumerate(made.disks):
                data = await self._content(image.target, image.format)
                if number or first is None:
                    wrong += self._no_instant(data, disk, f"backup {number}, of disk {disk}")
                elif data != self.matrix.contents[disk]:
                    wrong.append("the first backup has changed")
        return wrong

    def _no_instant(self, data, disk, name):
        spec = self.specs[disk]
        bounds = Bounds(acked=self.first[disk].acked, issued=self.last[disk].issued)
        found = check_point_in_time(data[spec.offset : spec.offset + spec.length], spec, bounds)
        wrong = [] if found.ok else [f"{name}: {found}"]
        return wrong + self._changed(data, disk, name)

    def _lost(self, data, disk, end, name):
        spec = self.specs[disk]
        area = data[spec.offset : spec.offset + spec.length]
        found = check_acknowledged(area, spec, end.acked, end.issued)
        wrong = [] if found.ok else [f"{name}: {found}"]
        return wrong + self._changed(data, disk, name)

    def _changed(self, data, disk, name):
        """Return whether there is anything else where the guest does not write."""
        spec, before = self.specs[disk], self.matrix.contents[disk]
        start, stop = spec.offset, spec.offset + spec.length
        same = data[:start] == before[:start] and data[stop : len(before)] == before[stop:]
        return [] if same else [f"{name}: has changed where nobody wrote"]

    async def _content(self, path, fmt):
        return await self.matrix.content_of(path, fmt)


def _described(chain):
    """Return how a chain is opened without its headers, and in which format."""
    options = None
    for file, fmt in reversed(chain):
        below = options
        options = {"driver": fmt, "file": {"driver": "file", "filename": file}}
        if fmt != "raw":
            options["backing"] = below
    return "json:" + json.dumps(options), None


class Crossings:
    """All that somebody may do in the midst of one verb. `async with`."""

    def __init__(self, verb, way, directory, qemu):
        self.verb, self.way, self.qemu = verb, way, qemu
        self.directory = directory / f"{verb}-{way}"
        self.tools = Tools.of(qemu)
        self.count = 0

    async def __aenter__(self):
        scenario = parse_scenario(self.verb.scenario, self.verb.name)
        self.built = await build(scenario, self.directory / "template", self.tools)
        self.contents = [
            await self.content_of(str(disk.active.path), disk.active.spec.format)
            for disk in self.built.disks
        ]
        async with self._point("the whole of it") as point:
            self.trace = await point.run(self.verb.what)
            wrong = await point.complaints("")
            assert not wrong, wrong
        return self

    async def __aexit__(self, *_):
        shutil.rmtree(self.directory, ignore_errors=True)

    def _point(self, label):
        self.count += 1
        return Crossing(self, f"{self.verb}, {self.way}: {label}")

    async def content_of(self, path, fmt):
        """Return what a guest reads from a closed image; None: of described ones."""
        raw = self.directory / "content.raw"
        given = [] if fmt is None else ["-f", fmt]
        await self.tools.run(self.tools.img, "convert", *given, "-O", "raw", path, str(raw))
        return raw.read_bytes()

    def number_of(self, command):
        """Return the number of the first of these commands."""
        return self.trace.index(command) + 1

    async def met(self, number):
        """Have somebody strike before a command; see that all is right."""
        async with self._point(f"struck before command {number}") as point:
            ours = ""
            try:
                await point.run(self.verb.what, number, point.strike)
            except Error as error:
                ours = f"{type(error).__name__}: {error}".replace(str(point.directory), "DIR")
            assert point.vm.running, f"QEMU has died; theirs: {point.theirs}; ours: {ours}"
            wrong = await point.complaints(ours)
            said = f"theirs: {point.theirs}; ours: {ours or 'done'}; now: {point.chains}"
            assert not wrong, "\n".join([said, *wrong])
            return Met(point.theirs, ours, point.chains)


async def cross_all(verb, way, directory, qemu):
    """Have somebody strike before every command; all slices of `make soak` together do."""
    chosen, seen = slice_of_soak(), Counter()
    async with Crossings(verb, way, directory, qemu) as matrix:
        for number, command in enumerate(matrix.trace, 1):
            if chosen(number):
                met = await matrix.met(number)
                seen["given up" if met.ours else "done"] += met.theirs is not None
                assert "CommandError" not in met.ours, f"before {command}: {met.ours}"
    print(f"{verb}, {way}: {dict(seen)} of {len(matrix.trace)} points")


async def cross_some(count, directory, qemu):
    """Have somebody strike at some points of one verb; return at how many it came to that."""
    _, chance = rounds(1)
    verb, way = chance.choice(VERBS), chance.choice(WAYS)
    tried = 0
    async with Crossings(verb, way, directory, qemu) as matrix:
        for number in chance.sample(range(1, len(matrix.trace) + 1), count):
            met = await matrix.met(number)
            tried += met.theirs is not None
    print(f"crossings: {tried} tried, {verb}, {way}")
    return tried
