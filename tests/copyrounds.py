"""Copies by chance, of disks to which the guest writes throughout: rounds of it.

A round draws one, two or eight disks of any sort, how they are attached, how the guest writes to
them, the moment that is copied and the targets. Everything of it follows from its seed. What was
copied must be the disks at one instant, within what the guest knows of that moment, and byte for
byte what was there beside the guest's area; nothing that it wrote may be lost where it is after.
"""

import asyncio
import contextlib
import random
import shutil
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

from chains import convert, digest_without
from chainwriters import Area

import qmpblock
from qmpblock.copying.copy import copy
from qmpblock.testing.images import BuiltImage, Tools, build
from qmpblock.testing.invariant import Invariant
from qmpblock.testing.scenario import Image, parse_scenario
from qmpblock.testing.stamps import (
    StressSpec,
    Taken,
    check_acknowledged,
    check_one_instant,
    check_point_in_time,
)

_SMALLEST, _LARGEST = 3 << 20, 9 << 20  # bytes of a disk
_AREA = 19  # of these many bits is the longest area that the guest writes to
_HUGE = 2 << 40
_SLOW = 3 << 20  # bytes a second of a disk, so that it is broken off
_STALL = 60.0  # seconds without a write of the guest's that count as a hang
KINDS = ("raw", "qcow2", "overlay", "over-raw", "luks", "overlay-luks", "data-file")
HUGE = "huge"
"""2 TiB, sparse: of a copy of the start QEMU's job goes over all of it, which takes its time."""


@dataclass
class Outcome:
    """What some rounds did, to be printed.

    :ivar rounds: by what was copied.
    :ivar writes: that were acknowledged.
    :ivar held: of each round, for how long its copy says it held the guest, in seconds.
    """

    rounds: dict[str, int] = field(default_factory=dict)
    writes: int = 0
    held: list[float] = field(default_factory=list)

    def __str__(self):
        lines = [f"{name}: {count}" for name, count in sorted(self.rounds.items())]
        most = max(self.held, default=0.0)
        lines.append(
            f"{sum(self.rounds.values())} rounds, {self.writes} writes, held {most * 1e3:.1f} ms "
            "at the most"
        )
        return "\n".join(lines)


async def copies_under_stress(
    start_qemu, directory, qemu, version, chance, count, kinds=(*KINDS * 4, HUGE), *, broken=False
):
    """Do so many rounds, each with a VM of its own; return what came of them.

    :param version: of the QEMU, as `QemuProcess.version` is.
    :param kinds: of disks, to choose from.
    :param broken: whether each copy is cancelled some times, and goes on from what that left.
    """
    outcome = Outcome()
    for number in range(count):
        one = Round(chance.getrandbits(32), version, kinds, broken=broken)
        room = directory / f"round{number}"
        room.mkdir()
        try:
            await one.whole(start_qemu, room, qemu, outcome)
        except BaseException as error:
            error.add_note(f"round {number}: {one}")
            raise
        shutil.rmtree(room)
        print(f"round {number}: {one}", flush=True)
    return outcome


@dataclass(frozen=True)
class Drawn:
    """One disk of a round.

    :ivar text: of the scenario.
    :ivar kind: of `KINDS`, or `HUGE`; `how`: it is attached.
    :ivar spec: where the guest writes; the number of the disk is still to be said.
    :ivar background: the byte that is there before.
    """

    text: str
    kind: str
    how: str
    spec: StressSpec
    background: int

    @property
    def area(self):
        """Where the guest writes."""
        return Area(self.spec.offset, self.spec.length, self.background)


class Round:
    """One copy of the disks of one VM.

    :param seed: of everything that is left to chance.
    :param version: of the QEMU: what it does not survive, and is refused, is not drawn.
    :param kinds: of disks, to choose from; huge and encrypted ones once each at the most.
    :param broken: whether the copy is cancelled some times, and goes on from what that left.
    """

    def __init__(self, seed, version, kinds, *, broken=False):
        self.seed = seed
        chance = random.Random(seed)
        self.at = chance.choice(["start", "end", "pivot"])
        self.background = chance.choice([0, 0xAA])
        self._kinds = list(kinds)
        self._old = version < (10, 0, 0)
        count = chance.choices([1, 2, 8], [2, 2, 1])[0]
        depth = chance.choice([1, 8, 32])
        rate = chance.choice([200, 400, 1500]) // min(count, 4)
        self.disks = [self._disk(chance, number, depth, rate) for number in range(count)]
        kinds = {disk.kind for disk in self.disks}
        secret = any("luks" in kind for kind in kinds)
        # Of what is encrypted no plaintext is made; a raw copy of the start takes the whole size
        # meanwhile on QEMU before 10.0.
        no_raw = secret or (self.at == "start" and HUGE in kinds)
        self.fmt = chance.choice(["qcow2", None] if no_raw else ["qcow2", "raw", None])
        self.verify = self.at == "start" and not no_raw and chance.random() < 0.3
        #: Seconds after which each attempt is cancelled.
        self.breaks = [chance.uniform(0.1, 3) for _ in range(chance.randint(1, 3) if broken else 0)]
        self.scenario = parse_scenario(
            "about: Drawn by chance.\ndisks:\n" + "".join(disk.text for disk in self.disks), "drawn"
        )

    def __str__(self):
        kinds = ", ".join(f"{one.kind} ({one.how})" for one in self.disks)
        proven = ", verified" if self.verify else ""
        proven += f", {len(self.breaks)} times broken off" if self.breaks else ""
        return f"seed {self.seed}: {self.at}{proven}, {self.fmt}, of {kinds}"

    def _disk(self, chance, number, depth, rate):
        kind = chance.choice(self._kinds)
        if kind == HUGE or "luks" in kind:  # each opening of these takes a second of the processor
            self._kinds = [one for one in self._kinds if one != kind]
        size = chance.randrange(_SMALLEST, _LARGEST) // 512 * 512
        if kind == HUGE:
            size = _HUGE - 512 * chance.randrange(1000)
        elif kind == "raw":
            size += chance.choice([0, 1, 100])
        spec = self._stress(chance, size, depth, rate)
        images = _images(kind, number, size, spec, self.background, chance)
        how = self._attach(chance)
        text = f"- name: d{number}\n  images: {images}\n  attach: {{{how}}}\n"
        return Drawn(text, kind, how, spec, self.background)

    def _stress(self, chance, size, depth, rate):
        """Choose where the guest writes, and how."""
        block_size = chance.choice([512, 4096, 65536])
        blocks = 1 << chance.randint(3, _AREA - (block_size.bit_length() - 1))
        room = size // 512 - blocks * block_size // 512
        return StressSpec(
            offset=512 * chance.randrange(room),
            blocks=blocks,
            block_size=block_size,
            queue_depth=depth,
            seed=chance.getrandbits(32),
            flush_every=chance.choice([0, 20, 200]),
            rate=rate,
            read_percent=chance.choice([0, 20]),
        )

    def _attach(self, chance):
        device = chance.choice(["virtio-blk", "virtio-scsi"])
        iothread = chance.choice(["none", "one"])
        throttled = chance.random() < 0.25
        if self._old and self.at == "pivot" and iothread == "one":
            throttled = False  # K27
        filters = "[throttle]" if throttled else "[]"
        discard = chance.choice(["ignore", "unmap"])
        return f"device: {device}, iothread: {iothread}, filters: {filters}, discard: {discard}"

    async def whole(self, start_qemu, room, qemu, outcome):
        """Do it, and see what came of it."""
        self.tools, self.room = Tools.of(qemu), room
        built = await build(self.scenario, room / "images", self.tools)
        self.built = [built.disk(f"d{number}") for number in range(len(self.disks))]
        self.digests = [
            await self._digest(disk.active, one.area)
            for disk, one in zip(self.built, self.disks, strict=True)
        ]
        vm = await start_qemu(built, guest=True)
        await self._stressed(vm)
        async with asyncio.timeout(300):
            result = await self._copied(vm)
        self.ends = []
        for spec in self.specs:
            await self._some_writes(vm, spec.disk)
        for spec in self.specs:  # from the first one on the others wait for it
            done = await vm.guest.stop_stress(spec.disk)
            assert (done.bad, done.errors) == (0, 0), done
            assert await vm.guest.check(spec.disk) > 0
            self.ends.append(done)
        if self.at != "pivot":
            await self.invariant.verify(vm)
        assert await vm.execute("query-jobs") == []
        await vm.quit()
        await self._check(built)
        outcome.rounds[self.at] = outcome.rounds.get(self.at, 0) + 1
        outcome.writes += sum(done.acked for done in self.ends)
        outcome.held.append(result.held)

    async def _stressed(self, vm):
        self.invariant = Invariant()
        await self.invariant.begin(vm)
        numbers = [await vm.io.guest_number(disk) for disk in self.built]
        specs = [replace(o.spec, disk=n) for o, n in zip(self.disks, numbers, strict=True)]
        if len(specs) > 1:
            specs = await vm.guest.stress_in_step(*specs)
        else:
            await vm.guest.stress(specs[0])
        self.specs = specs
        for spec in specs:
            await self._some_writes(vm, spec.disk)

    async def _copied(self, vm):
        (self.room / "copies").mkdir()
        numbers = [spec.disk for spec in self.specs]
        async with qmpblock.connect(vm.monitor_path) as controller:
            disks = [await controller.disk(await vm.io.qom_path(disk)) for disk in self.built]
            self.targets = [self.room / "copies" / disk.spec.name for disk in self.built]
            targets = dict(zip(disks, self.targets, strict=True))
            words = {"at": self.at, "format": self.fmt, "resume": bool(self.breaks)}
            for seconds in self.breaks:
                await _broken_off(controller, targets, seconds, **words)
            copying = copy(controller, targets, verify=self.verify, **words)
            async with AsyncExitStack() as stack:
                if self.at == "start":
                    async with vm.guest.bounds(*numbers) as self.bounds:
                        job = await stack.enter_async_context(copying)
                else:
                    job = await stack.enter_async_context(copying)
                    async for seen in job:
                        if seen.ready:
                            break
                    async with vm.guest.bounds(*numbers) as self.bounds:
                        await job.complete()
        return job.result

    async def _some_writes(self, vm, number):
        """Wait until the guest has had some more writes acknowledged."""
        begin = (await vm.guest.progress(number)).acked
        deadline = asyncio.get_running_loop().time() + _STALL
        while (seen := await vm.guest.progress(number)).acked < begin + 10:
            if asyncio.get_running_loop().time() > deadline:
                raise AssertionError(f"the guest hangs: {seen}\n{await vm.diagnose()}")
            await asyncio.sleep(0.005)

    # -- the verdict

    async def _check(self, built):
        """See that copies are of one instant, and that where the guest is nothing is lost."""
        copies = [
            _copy_of(disk.active, target, self.fmt)
            for disk, target in zip(self.built, self.targets, strict=True)
        ]
        images = [disk.active for disk in self.built]
        # Over there the guest wrote on; what it left is of that instant.
        stays, passed = (copies, images) if self.at == "pivot" else (images, copies)
        taken = {}
        for number, spec in enumerate(self.specs):
            done = self.ends[number]
            data = await self._content(stays[number], number)
            verdict = check_acknowledged(
                data, spec, done.acked, done.issued, background=self.background
            )
            assert verdict.ok, f"{stays[number].path}: {verdict}"
            data = await self._content(passed[number], number)
            taken[passed[number].path.name] = Taken(data, spec, self.bounds[spec.disk])
        if len(taken) > 1:
            verdict = check_one_instant(taken, background=self.background)
        else:
            [one] = taken.values()
            verdict = check_point_in_time(*one, background=self.background)
        assert verdict.ok, verdict
        for image in (*copies, *images):
            await image.check(built.tools)

    async def _content(self, image, number):
        """Return what is in the guest's area; the rest must be what it was before."""
        area = self.disks[number].area
        content = self.room / "content.raw"
        await convert(self.tools, image, image.describe(), content)
        assert digest_without(content, area) == self.digests[number], image.path
        with content.open("rb") as file:
            file.seek(area.offset)
            data = file.read(area.length)
        content.unlink()
        return data

    async def _digest(self, image, area):
        content = self.room / "content.raw"
        await convert(self.tools, image, image.describe(), content)
        digest = digest_without(content, area)
        content.unlink()
        return digest


def _copy_of(active: BuiltImage, target: Path, fmt: str | None) -> BuiltImage:
    """Return the copy of a whole disk, encrypted as it is."""
    own = active.spec.format
    fmt = fmt or (own if own == "raw" else "qcow2")
    secret = next((layer.secret for layer in active.chain() if layer.secret), None)
    options = (("encrypt.format", "luks"),) if secret else ()
    word = secret[1] if secret else None
    spec = Image(target.name, fmt, active.spec.size, options=options, secret=word)
    return BuiltImage(spec, target, secret=secret)


def _images(kind, number, size, spec, background, chance):
    """Return a disk's images as YAML, with content that leaves the guest's area one byte."""
    end = size // 512 * 512
    base, top = (_content(chance, spec, end, byte) for byte in (0xBB, 0xCC))
    if background or kind == "luks":  # what nobody wrote to reads as anything there
        base.append(f"write {spec.offset} {spec.length} {background:#x}")
    base, top = (f"[{', '.join(lines)}]" for lines in (base, top))
    cluster = chance.choice([512, 4096, 65536, 2 << 20] if kind != HUGE else [65536, 2 << 20])
    options = f"options: {{cluster_size: {cluster}}}"
    name = f"d{number}"
    luks = "encrypt.format: luks"
    return {
        "raw": f"[{{format: raw, size: {size}, content: {base}}}]",
        "qcow2": f"[{{size: {size}, {options}, content: {base}}}]",
        HUGE: f"[{{size: {size}, {options}, content: {base}}}]",
        "overlay": f"[{{size: {size}, {options}, content: {base}}}, {{content: {top}}}]",
        "over-raw": f"[{{format: raw, size: {size}, content: {base}}}, "
        f"{{{options}, content: {top}}}]",
        "luks": f"[{{format: luks, size: {size}, secret: sesame{number}, content: {base}}}]",
        "overlay-luks": f"[{{size: {size}, content: {base}}}, {{options: {{{luks}}}, "
        f"secret: sesame{number}, content: {top}}}]",
        "data-file": f"[{{size: {size}, {options}, data_file: {name}.data, content: {base}}}]",
    }[kind]


def _content(chance, spec, end, byte):
    """Return some writes beside the guest's area."""
    lines = []
    for _ in range(chance.randint(1, 6)):
        offset = 512 * chance.randrange(end // 512)
        length = min(512 * chance.randint(1, 2048), end - offset)
        if offset < spec.offset:
            length = min(length, spec.offset - offset)
        elif offset < spec.offset + spec.length:
            continue
        lines.append(f"{chance.choice(['write', 'write', 'zero'])} {offset} {length} {byte:#x}")
    return [line.rsplit(" ", 1)[0] if line.startswith("zero") else line for line in lines]


async def _broken_off(controller, targets, seconds, **words):
    """Begin a copy, or go on with it, and cancel that after so long; it may be over before."""

    async def copying():
        async with copy(controller, targets, speed=_SLOW * len(targets), **words) as job:
            async for _ in job:
                pass
            await asyncio.Event().wait()  # what is whole is not to be taken for unfinished

    task = asyncio.ensure_future(copying())
    await asyncio.wait({task}, timeout=seconds)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
