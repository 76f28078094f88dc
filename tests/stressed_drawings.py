"""The eight drawings by policy alone, while the guest writes to the very ranges: rounds of it.

A round takes one drawing in one format, some MiB large, and a stress area of the guest's that
lies across what is to change: data below, blanks, zeros. What the guest wrote is computed from
its stress run; everything else must be as drawn, to the cluster on the map and to the byte in
the closed image.

QEMU may abort by itself when it drains a QED image to whose new clusters the guest writes
(`_QED_ABORT`; measured on 7.2.22 and 11.1.2, with no qmpblock, by mere stop and cont, once in
some hundred times). A round that meets this ends as one in which QEMU is killed: the image must
hold every flushed write. It is counted, and done again.
"""

import asyncio
import contextlib
from dataclasses import dataclass, field
from itertools import cycle

import numpy as np
from allocating import content
from applying import DROPPED, apply_to, one_disk, plan_of, without_backing
from seed_drawings import (
    check_drawing,
    drawings,
    in_format,
    layers_of,
    seen_by_guest,
    wanted_by,
)

import qmpblock
from qmpblock.ranges import Ranges
from qmpblock.testing.guest import GuestError
from qmpblock.testing.images import Tools, build
from qmpblock.testing.invariant import Invariant
from qmpblock.testing.stamps import SECTOR, StressSpec, block_of, check_acknowledged

SCALE = 32  # a block of the drawing is 2 MiB
RAW_CLUSTER = 4096  # bytes that a file system allocates at once, at most
_QED_ABORT = "qed_aio_write_alloc: Assertion `s->allocating_acb == NULL' failed"
_TURNS = 5  # of one round, at most
_STALL = 60.0  # seconds without a write of the guest's that count as a hang


@dataclass
class Outcome:
    """What some rounds did, to be printed.

    :ivar rounds: by drawing and format; `aborts`: of QEMU's own, each of another try at a round.
    :ivar writes: that were acknowledged; `met`: bytes of clusters to which the guest wrote first
        while the policy was being applied.
    :ivar held: of each round, the longest that a pivot held the guest, by qmpblock's own clock;
        `longest`: the guest's longest request meanwhile. Seconds.
    """

    rounds: dict[str, int] = field(default_factory=dict)
    aborts: int = 0
    writes: int = 0
    met: int = 0
    held: list[float] = field(default_factory=list)
    longest: list[float] = field(default_factory=list)

    def __str__(self):
        pivots = [(held, longest) for held, longest in zip(self.held, self.longest, strict=True)]
        staged = [longest for held, longest in pivots if held]
        others = [longest for held, longest in pivots if not held]
        lines = [f"{name}: {count}" for name, count in sorted(self.rounds.items())]
        lines += [
            f"{sum(self.rounds.values())} rounds, {self.writes} writes, {self.met >> 10} KiB met",
            f"QEMU aborted by itself, on QED: {self.aborts}",
            f"held by pivots, ms: {_spread([held for held in self.held if held])}",
            f"guest's longest request of rounds with pivots, ms: {_spread(staged)}",
            f"guest's longest request of rounds without, ms: {_spread(others)}",
        ]
        return "\n".join(lines)


def _spread(seconds):
    if not seconds:
        return "none"
    least, median, most = np.quantile(np.array(seconds) * 1000, [0, 0.5, 1])
    return f"{least:.1f} / {median:.1f} / {most:.1f} (least, median, most of {len(seconds)})"


def dealt(count, chance):
    """Deal `count` drawings, each with a format, by chance: one after another equally often."""
    every = drawings()
    chance.shuffle(every)
    return [param.values for param, _ in zip(cycle(every), range(count), strict=False)]


async def stressed_rounds(start_qemu, directory, qemu, chance, count):
    """Do so many rounds, each with a VM of its own; return what came of them."""
    outcome = Outcome()
    for number, (scenario, fmt) in enumerate(dealt(count, chance)):
        for turn in range(_TURNS):
            room = directory / f"round{number}-{turn}"
            room.mkdir()
            one = _Round(scenario, fmt, chance)
            try:
                if await one.whole(start_qemu, room, qemu, outcome):
                    break
            except BaseException as error:
                error.add_note(f"round {number}: {one}")
                raise
            outcome.aborts += 1
        else:
            raise AssertionError(f"round {number}: {_TURNS} times in a row {_QED_ABORT}")
        outcome.rounds[one.name] = outcome.rounds.get(one.name, 0) + 1
    return outcome


class _Round:
    """One drawing in one format, and the guest's writes to it."""

    def __init__(self, scenario, fmt, chance):
        self.name = f"{scenario}-{fmt}"
        # QEMU's own check finds leaks in a full QED image of small clusters, whoever filled it.
        sizes = {"raw": [RAW_CLUSTER], "qed": [64 << 10], "qcow2": [4 << 10, 64 << 10]}
        self.cluster = chance.choice(sizes[fmt])
        options = [] if fmt == "raw" else [("cluster_size", str(self.cluster))]
        self.scenario = in_format(scenario, fmt, scale=SCALE, options=options)
        self.drawing = self.scenario.drawing
        self.spec = self._stress(chance)

    def __str__(self):
        return f"{self.name}, clusters of {self.cluster}, {self.spec}"

    def _stress(self, chance):
        """Choose an area across something that is to change, which is not all that is."""
        drawing = self.drawing
        changed = self._changed()
        size = drawing.block * len(drawing.after[-1])
        while True:
            length = drawing.block * chance.choice([2, 4])
            offset = chance.randrange((size - length) // 512 + 1) * 512
            area = Ranges([(offset, offset + length)])
            outside = [cell for cell in changed if not Ranges([cell]) & area]
            if outside and Ranges(changed) & area:
                break
        block_size = chance.choice([512, 4096, 65536])
        return StressSpec(
            offset=offset,
            blocks=length // block_size,
            block_size=block_size,
            queue_depth=chance.choice([1, 8, 32]),
            seed=chance.getrandbits(32),
            flush_every=chance.choice([0, 20, 200]),
            rate=chance.choice([0, 1000, 200]),
            read_percent=20,
        )

    def _changed(self):
        """Return the cells in which the active layer changes."""
        pairs = zip(self.drawing.before[-1], self.drawing.after[-1], strict=True)
        block = self.drawing.block
        return [(n * block, (n + 1) * block) for n, (a, b) in enumerate(pairs) if a != b]

    async def whole(self, start_qemu, directory, qemu, outcome):
        """Do it; return whether QEMU lived."""
        built = await build(self.scenario, directory / "images", Tools.of(qemu))
        vm = await start_qemu(built, guest=True)
        try:
            await self.apply(vm, outcome)
            await vm.quit()
        except Exception:
            if not await self._aborted(vm):
                raise
            vm.expect_exit()
            await self.check_dead(built)
            return False
        await self.check_closed(built)
        return True

    async def _aborted(self, vm):
        """Whether QEMU died of what it dies of by itself."""
        if self.scenario.disks[0].active.format != "qed":
            return False
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(2):
                while vm.running:
                    await asyncio.sleep(0.05)
        return not vm.running and _QED_ABORT in vm.evidence()

    def writes(self, last):
        """Return where the guest's writes 1..last went."""
        blocks = np.unique(block_of(self.spec, 1, last)).astype(np.int64)
        starts = self.spec.offset + blocks * self.spec.block_size
        return Ranges.from_arrays(starts, starts + self.spec.block_size)

    async def apply(self, vm, outcome):
        """Apply the policy while the guest writes; see what came of it in the VM."""
        policy = one_disk(vm, "vd0", **wanted_by(self.drawing))
        alone = self.drawing.independent
        invariant = Invariant()
        await invariant.begin(vm)
        if alone:
            invariant.expect(DROPPED)
        stops = vm.control.subscribe("STOP")
        await vm.guest.stress(self.spec)
        await self._some_writes(vm, 1)
        await vm.guest.latency()  # counts anew from here
        before = self.seen = await vm.guest.progress()

        watch = asyncio.create_task(self._watch(vm))
        try:
            [result] = await apply_to(policy)
        finally:
            watch.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watch
        latency = await vm.guest.latency()
        after = await vm.guest.progress()
        assert (result["state"], result["error"]) == ("done", None)
        assert result["dropped"] == ([str(path) for path in self._backing(vm)] if alone else [])
        assert after.running, after
        await self._some_writes(vm, after.acked + 1)

        # There is nothing left to do, as the guest writes on.
        [again] = await plan_of(policy)
        assert again["steps"] == []
        [second] = await apply_to(policy)
        assert (second["state"], second["error"]) == ("nothing", None)

        self.end = await vm.guest.stop_stress()
        assert (self.end.bad, self.end.errors) == (0, 0), self.end
        assert self.end.acked == self.end.issued
        assert await vm.guest.check() > 0
        assert stops.pending() == [], "the guest was paused"

        layers = await layers_of(vm)
        size = layers[0].map.length
        written = self.writes(self.end.issued)
        touched = written.align_out(self.cluster, size)
        assert touched - layers[0].map.where(data=True) == Ranges()
        check_drawing(layers, self.drawing, touched)
        await invariant.verify(vm)

        outcome.writes += self.end.acked
        first = self.writes(after.issued).align_out(self.cluster, size)
        outcome.met += (first - self.writes(before.issued).align_out(self.cluster, size)).total
        outcome.held.append(result["held"])
        outcome.longest.append(latency.held_us / 1e6)
        print(
            f"{self.name}: {self.end.acked} writes, held {result['held'] * 1e3:.1f} ms, "
            f"the guest's longest request {latency.held_us / 1e3:.1f} ms"
        )

    async def _watch(self, vm):
        """Remember how far the guest is, in case that QEMU dies."""
        with contextlib.suppress(GuestError):
            while True:
                self.seen = await vm.guest.progress()
                await asyncio.sleep(0.05)

    async def _some_writes(self, vm, count):
        """Wait until so many writes are acknowledged."""
        deadline = asyncio.get_running_loop().time() + _STALL
        while (seen := await vm.guest.progress()).acked < count:
            if asyncio.get_running_loop().time() > deadline:
                raise AssertionError(f"the guest hangs: {seen}\n{await vm.diagnose()}")
            await asyncio.sleep(0.005)

    def _backing(self, vm):
        return [image.path for image in vm.disks[0].active.chain()[1:]]

    async def check_closed(self, built):
        """See that the closed active image, alone where it should be, holds it all."""
        active = built.disks[0].active
        if self.drawing.independent:
            active = await without_backing(active, built.tools)
        data = await content(active, built.tools)
        self._check_content(data, self.end.acked, self.end.issued)
        await active.check(built.tools)

    async def check_dead(self, built):
        """See that the image of a QEMU that died holds every flushed write, by its own header."""
        active = built.disks[0].active
        # The controller, which lives, has recovered it by itself.
        assert await qmpblock.recover_images([active.path], dry_run=True) == []
        raw = active.path.with_name("content.raw")
        words = ["convert", "-f", active.spec.format, "-O", "raw", str(active.path), str(raw)]
        await built.tools.run(built.tools.img, *words)
        self._check_content(raw.read_bytes(), self.seen.flushed, self.seen.issued + 100_000)

    def _check_content(self, data, acked, issued):
        """Check each sector: a stamp where there must or may be one, and what is drawn elsewhere.

        :param acked: the last write that must be there; `issued`: that may be.
        """
        found = np.frombuffer(data, np.uint8).reshape(-1, SECTOR)
        drawn = np.array(seen_by_guest(self.drawing.before), np.uint8)
        drawn = np.repeat(drawn, self.drawing.block // SECTOR)[:, np.newaxis]
        assert len(found) == len(drawn)
        untouched = (found == drawn).all(axis=1)
        first = self.spec.offset // SECTOR
        inside = np.zeros(len(found), np.bool_)
        inside[first : first + self.spec.length // SECTOR] = True
        wrong = np.flatnonzero(~untouched & ~inside)
        assert not len(wrong), f"{len(wrong)} sectors, from {wrong[0]}, that nobody wrote to"
        stamps = np.where(untouched[:, np.newaxis], np.uint8(0), found)[inside]
        verdict = check_acknowledged(stamps.tobytes(), self.spec, acked, issued)
        assert verdict.ok, verdict
