"""Kill matrices: each operation, killed before and after every command that it sends.

A matrix is generated. One run to the end tells the commands of an operation, and what the VM
is like afterwards. Then, for every command, both moments and each way to go on, with a fresh
VM whose guest writes all the time:

- the controller is killed, and somebody undoes, carries on, or does the same again;
- QEMU is killed under a controller that lives, or together with it.

What must hold is in `_Point.settled` (QEMU lives) and `_Point.images_hold` (it does not).
"""

import asyncio
import contextlib
import dataclasses
import json
import os
import re
import shutil
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from dying import DIED, deadly, run

import qmpblock
from qmpblock.errors import BusyError, DisconnectedError, MonitorError, RequestError, ToolError
from qmpblock.names import POLLING_LOCK
from qmpblock.testing.guest import GuestError
from qmpblock.testing.images import Tools, build
from qmpblock.testing.invariant import VMState, snapshot
from qmpblock.testing.qemu import QemuProcess
from qmpblock.testing.scenario import parse_scenario
from qmpblock.testing.stamps import Bounds, StressSpec, check_acknowledged

MOMENTS = ("before", "after")
#: Ways to go on after the controller was killed; `slow`: while its job is still copying.
WAYS = ("undo", "carry-on", "again", "undo-slow", "carry-on-slow", "again-slow")
#: Ways to kill QEMU: under a controller that lives, or together with it; `quiet`: the guest has
#: flushed and rests, so that no flush of its own saves what a job has written (K6).
DEATHS = ("qemu", "both", "qemu-quiet")
SLOW = 1 << 20  # bytes a second
_SETTLE = 3.0  # seconds for QEMU to close what it was told to close
_STALL = 20.0  # seconds without a write of the guest's that count as a hang

CHAIN = """
about: A chain whose lower layers hold data, none of it where the guest writes.
{attach}images:
  - {{format: raw, size: 8M, content: [write 0 3M 0xaa]}}
  - {{size: 8M, content: [write 1M 2M 0xbb]}}
  - {{size: 8M, content: [write 2M 1M 0xcc]}}
  - {{size: 8M, content: [write 512K 1M 0xdd]}}
"""
SHORT = """
about: A middle layer that hides what lies below by being short.
{attach}images:
  - {{format: raw, size: 8M, content: [write 0 6M 0xaa]}}
  - {{size: 5M, content: [write 1M 1M 0xbb, zero 4M 1M]}}
  - {{size: 8M, content: [write 512K 1M 0xcc]}}
"""
TWO = """
about: Two disks, one of them a chain.
disks:
  - images: [{{format: raw, size: 8M, content: [write 0 2M 0xaa]}}, {{}}]
  - images: [{{size: 8M, content: [write 0 2M 0xbb]}}]
"""
IOTHREAD = "attach: {iothread: one}\n"
#: Where the guest writes: zeros in each scenario, in SHORT thanks to the short layer.
AREA = {"offset": 4 << 20, "blocks": 512, "block_size": 4096}


@dataclass(frozen=True)
class Operation:
    """One row of the matrices.

    :ivar what: the request of dying.py; `{}` in file names stands for the images' directory.
    :ivar chains: the documented result: the file names of each disk's layers.
    :ivar extra: of QEMU's command line.
    :ivar scars: whether a cancelled job of it leaves nodes and files open for writing: QEMU's
        doing (a commit on 7.2, a stream into a middle layer on 11.1).
    """

    name: str
    scenario: str
    what: dict
    chains: tuple
    scars: bool = False
    extra: tuple = ()

    def __str__(self):
        return self.name

    @property
    def runs_a_job(self):
        """Whether it can be slowed down."""
        return self.what["do"] != "snapshot"

    @property
    def moves(self):
        """Whether the image to start from may be another one afterwards."""
        return True

    @property
    def keeps(self):
        """Whether an image that is not whole may stay beside the others, to be gone on from."""
        return False

    @property
    def leaves_nodes(self):
        """Whether nodes of ours are in the guest's chains afterwards."""
        return self.what["do"] == "snapshot"

    def request(self, directory, slow=False):
        """Return what dying.py is asked to do."""
        text = json.dumps(self.what).replace("{}", str(directory))
        return json.loads(text) | ({"speed": SLOW} if slow else {})

    async def prepare(self, tools, directory):
        """Make what has to be there besides the images, before the VM is started."""

    @property
    def stays(self):
        """What of the VM's state, as a pattern, the operation looks at by itself; None: nothing."""
        return None

    async def begin(self, address, directory):
        """Do what has to be done to the VM before it."""

    async def check_settled(self, vm, directory):
        """See that what it has done, or not, is all right, while the guest goes on."""

    async def check_kept(self, point, bounds):
        """See that what it has made, or had before, holds what it should, whoever died.

        :param bounds: between which of the guest's writes it was at work, disk by disk.
        """

    async def check_restarted(self, point):
        """See that all is right in a VM that is started anew, after QEMU died."""

    async def check_done(self, address, directory):
        """See that it is done to the VM at an address, where that shows in more than the chains."""

    def check_left(self, directory):
        """See that what must be left of it is, whoever died."""

    def check_said(self, directory, standing):
        """See that a controller that outlived QEMU said what there is, `standing`."""


def _operations():
    stream = {"do": "stream", "disk": "vd0"}
    commit = {"do": "commit", "disk": "vd0"}
    layer = "{}/d0-%d.qcow2"
    raw = "{}/d0-0.raw"
    one = {"do": "snapshot", "overlays": {"vd0": "{}/new-0.qcow2"}}
    two = {"do": "snapshot", "overlays": {"vd0": "{}/new-0.qcow2", "vd1": "{}/new-1.qcow2"}}
    chain = ("d0-3.qcow2", "d0-2.qcow2", "d0-1.qcow2", "d0-0.raw")
    plain, iothread = CHAIN.format(attach=""), CHAIN.format(attach=IOTHREAD)
    yield Operation("snapshot", plain, one, (("new-0.qcow2", *chain),))
    yield Operation(
        "snapshot-of-two",
        TWO.format(),
        two,
        (("new-0.qcow2", "d0-1.qcow2", "d0-0.raw"), ("new-1.qcow2", "d1-0.qcow2")),
    )
    yield Operation("stream", plain, stream, (chain[:1],))
    yield Operation("stream-iothread", iothread, stream, (chain[:1],))
    yield Operation(
        "stream-hidden",
        SHORT.format(attach=""),
        stream | {"base": raw},
        (("d0-2.qcow2", "d0-0.raw"),),
    )
    yield Operation(
        "stream-middle",
        plain,
        stream | {"top": layer % 2, "base": raw},
        (("d0-3.qcow2", "d0-2.qcow2", "d0-0.raw"),),
        scars=True,
    )
    yield Operation(
        "commit-middle",
        plain,
        commit | {"top": layer % 2, "base": layer % 1},
        (("d0-3.qcow2", "d0-1.qcow2", "d0-0.raw"),),
        scars=True,
    )
    yield Operation(
        "pivot", plain, commit | {"base": layer % 1}, (("d0-1.qcow2", "d0-0.raw"),), scars=True
    )
    yield Operation("pivot-iothread", iothread, commit, (("d0-0.raw",),), scars=True)
    # Writes wait in QEMU, not in the guest's queue, so that QEMU 7.2 has to be paused (K26).
    queued = ("-global", "virtio-blk-pci.ioeventfd=off")
    yield Operation("pivot-queued", plain, commit, (("d0-0.raw",),), scars=True, extra=queued)


OPERATIONS = tuple(_operations())


def have_own_places(directory):
    """Have what we keep, and what is there for a while, lie in a point's own directory."""
    for name, place in (("QMPBLOCK_STATE", "state"), ("TMPDIR", "t")):
        (directory / place).mkdir(parents=True)
        os.environ[name] = str(directory / place)
    tempfile.tempdir = os.environ["TMPDIR"]


class Graveyard:
    """The process that forks controllers which die (dying.py). `async with`."""

    async def __aenter__(self):
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, str(Path(__file__).with_name("dying.py"))),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=1 << 20,
        )
        return self

    async def __aexit__(self, *_):
        self._process.stdin.close()
        try:
            await asyncio.wait_for(self._process.wait(), _STALL)
        except TimeoutError:  # a test failed while a controller of it works
            self._process.kill()
            await self._process.wait()

    async def control(self, vm, what, number=0, moment="before", qemus=(), nbd=None):
        """Run a controller; return whether it died, and the commands that it sent.

        :param nbd: where an NBD server of somebody else's listens in the VM.
        """
        request = {
            "environment": {name: os.environ[name] for name in ("QMPBLOCK_STATE", "TMPDIR")},
            "address": vm.monitor_path,
            "what": what,
            "number": number,
            "moment": moment,
            "qemus": list(qemus),
            "nbd": nbd,
        }
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        answer = json.loads(await self._process.stdout.readline())
        # It said so just before it died, and whoever looks for it must not find it alive.
        async with asyncio.timeout(_STALL):
            while Path(f"/proc/{answer['pid']}").exists() and answer["code"] == DIED:
                await asyncio.sleep(0.001)
        assert answer["code"] in (0, DIED), f"the controller failed: {answer}; {vm.evidence()}"
        return answer["code"] == DIED, answer["trace"]


@dataclass
class Reference:
    """What one run to the end taught: the commands, and the VM after them."""

    trace: list
    after: VMState


class Matrix:
    """All matrices of one operation: its images, made once, and its dying controllers."""

    def __init__(self, operation, directory, qemu):
        self.operation = operation
        self.directory = directory / operation.name
        self.qemu = qemu
        self.tools = Tools.of(qemu)
        self.graveyard = Graveyard()
        self.count = 0
        self.reference = None

    async def __aenter__(self):
        scenario = parse_scenario(self.operation.scenario, self.operation.name)
        self.built = await build(scenario, self.directory / "template", self.tools)
        self.content = [
            await self.content_of(disk.active.path, disk.active.spec.format)
            for disk in self.built.disks
        ]
        await self.graveyard.__aenter__()
        try:
            async with self.point("the whole operation") as point:
                request = self.operation.request(point.images)
                died, trace = await self.graveyard.control(point.vm, request)
                assert not died
                await point.is_done()
                self.reference = Reference(trace, await point.state())
                await point.settled()
        except BaseException:
            await self.graveyard.__aexit__()
            raise
        return self

    async def __aexit__(self, *_):
        await self.graveyard.__aexit__()

    def point(self, label, *, quiet=False):
        """Make a VM of its own for one point; in a quiet one the guest has ended its writes."""
        self.count += 1
        return _Point(self, f"{self.operation}, {label}", quiet=quiet)

    async def content_of(self, path, fmt):
        """Return what a guest reads from a closed image, its chain opened as recorded."""
        raw = self.directory / "content.raw"
        await self.tools.run(self.tools.img, "convert", "-f", fmt, "-O", "raw", str(path), str(raw))
        return raw.read_bytes()

    @property
    def first_change(self):
        """The number of the first command that changes anything: it takes the lock."""
        trace = enumerate(self.reference.trace, 1)
        return next(number for number, sent in trace if sent.startswith("object-add"))

    def points(self, slow=False):
        """Yield (number, moment) of every point.

        :param slow: only those around the start of the job: later ones are no different.
        """
        numbers = range(1, len(self.reference.trace) + 1)
        if slow:
            if not self.operation.runs_a_job:
                return
            start = 1 + next(
                index
                for index, command in enumerate(self.reference.trace)
                if command in ("block-stream", "block-commit", "blockdev-mirror", "blockdev-backup")
            )
            numbers = range(start, start + 5)
        for number in numbers:
            for moment in MOMENTS:
                yield number, moment

    # one point of each matrix

    async def killed_controller(self, number, moment, way):
        """Kill a controller, and go on; return whether it died (it may have ended before)."""
        slow = way.endswith("-slow")
        async with self.point(f"killed {moment} command {number}, then {way}") as point:
            request = self.operation.request(point.images, slow)
            died, _ = await self.graveyard.control(point.vm, request, number, moment)
            assert point.vm.running, point.vm.evidence()
            if way == "carry-on-slow":
                await point.hurry()  # at that speed it would never catch up with the guest
            await point.go_on(way.removesuffix("-slow"))
            await point.settled()
        return died

    async def killed_recovery(self, first, number, moment, way):
        """Kill a controller, then its recovery, then recover; return whether that died."""
        label = f"killed at {first}, recovery ({way}) killed {moment} command {number}"
        async with self.point(label) as point:
            request = self.operation.request(point.images)
            await self.graveyard.control(point.vm, request, *first)
            died, _ = await self.graveyard.control(
                point.vm, _recovery(way, request), number, moment
            )
            assert point.vm.running, point.vm.evidence()
            await point.go_on("undo")
            await point.settled()
        return died

    async def recovery_trace(self, first, way):
        """Return the commands that a recovery sends after a kill at `first`."""
        async with self.point(f"killed at {first}, then recovered") as point:
            request = self.operation.request(point.images)
            await self.graveyard.control(point.vm, request, *first)
            _, trace = await self.graveyard.control(point.vm, _recovery(way, request))
            await point.settled()
        return trace

    async def recovered_by_two(self, number, moment, ways):
        """Kill a controller, and have two others go on at once, as `ways` say."""
        async with self.point(f"killed {moment} command {number}, then {ways} at once") as point:
            request = self.operation.request(point.images)
            died, _ = await self.graveyard.control(point.vm, request, number, moment)
            vm = point.vm
            await asyncio.gather(
                *(
                    _unless_busy(address, _recovery(way, request))
                    for address, way in zip(
                        (vm.monitor_path, vm.second_monitor_path), ways, strict=True
                    )
                )
            )
            await point.go_on("undo")
            await point.settled()
        return died

    def representative(self):
        """Choose points after which there is something to recover: one for each stage."""
        stages = {
            "object-add": "after",
            "block-export-add": "after",
            "blockdev-add": "after",
            "block-stream": "after",
            "block-commit": "after",
            "block-dirty-bitmap-add": "after",
            "block-dirty-bitmap-merge": "after",
            "block-dirty-bitmap-remove": "after",
            "job-complete": "after",
            "blockdev-backup": "after",
            "blockdev-mirror": "after",
            "job-finalize": "before",
            "transaction": "after",
        }
        trace = self.reference.trace
        last = {command.split()[0]: number for number, command in enumerate(trace, 1)}
        return [(last[command], moment) for command, moment in stages.items() if command in last]

    async def killed_qemu(self, number, moment, death):
        """Kill QEMU, its controller with it or not; return whether it came to that."""
        quiet = death.endswith("-quiet")
        label = f"QEMU killed {moment} command {number} ({death})"
        async with self.point(label, quiet=quiet) as point:
            request = self.operation.request(point.images)
            kill = point.die_together if death == "both" else point.die_under
            if not await kill(request, number, moment):
                if not quiet:
                    await point.settled()
                return False
            await point.images_hold()
            if point.standing is not None:
                self.operation.check_said(point.images, point.standing)
            await self.operation.check_kept(point, point.bounds())
            await self.operation.check_restarted(point)
        return True


class _Point:
    """One VM, from its start to the last look at its images. `async with`."""

    def __init__(self, matrix, label, *, quiet):
        self.matrix = matrix
        self.quiet = quiet
        self.operation = matrix.operation
        self.label = label
        self.directory = matrix.directory / str(matrix.count)
        self.images = self.directory / "images"
        self.state_directory = self.directory / "state"
        self.refused = False
        self.standing = None
        self.progress = []
        self.trace = []

    async def __aenter__(self):
        have_own_places(self.directory)
        # shutil copies holes as zeros, which takes longer than all else here.
        await self.matrix.tools.run(
            "cp", "-R", "--sparse=always", str(self.matrix.built.directory), str(self.images)
        )
        await self.operation.prepare(self.matrix.tools, self.images)
        built = [
            dataclasses.replace(disk, active=_moved(disk.active, self.images))
            for disk in self.matrix.built.disks
        ]
        self.built = built
        self.vm = self.started_from(self.directory)
        self.specs = [
            StressSpec(disk=number, seed=number + 1, flush_every=64, read_percent=20, **AREA)
            for number in range(len(built))
        ]
        try:
            await self.vm.start()
            await self.operation.begin(self.vm.monitor_path, self.images)
            self.before = await self.state()
            for spec in self.specs:
                await self.vm.guest.stress(spec)
            await self.guest_moves("flushed")
            if self.quiet:
                for spec in self.specs:
                    await self.vm.guest.stop_stress(spec.disk)
                    await self.vm.guest.flush(spec.disk)
            await self._note_progress()
            self.first = list(self.progress)
        except BaseException:
            await self.vm.close()
            raise
        return self

    def started_from(self, directory):
        """Return a QEMU on the images, which has `directory` for itself."""
        return QemuProcess(
            self.built,
            guest=True,
            qemu=self.matrix.qemu,
            directory=directory,
            extra=self.operation.extra,
        )

    def bounds(self, more=100_000):
        """Return between which of the guest's writes a controller was at work, disk by disk.

        :param more: what the guest may have written since it was last asked.
        """
        return [
            Bounds(acked=first.acked, issued=now.issued + more)
            for first, now in zip(self.first, self.progress, strict=True)
        ]

    async def __aexit__(self, kind, error, trace):
        if error is not None:
            error.add_note(f"at the point: {self.label}")
            error.add_note(self.vm.evidence())
        else:
            self.operation.check_left(self.images)
        await self.vm.close()
        shutil.rmtree(self.directory, ignore_errors=True)

    # looking

    async def state(self):
        """Return the state of the VM, with what differs between points taken out."""
        await self.vm.execute("query-status")
        seen = await snapshot(self.vm.control, self.vm.pid, [self.images])
        lines = Counter()
        for line, count in seen.lines.items():
            line = line.replace(str(self.directory), "DIR")
            if self.operation.stays and re.search(self.operation.stays, line):
                continue
            lines[re.sub(r"qmpblock-[0-9a-f]{8}", "qmpblock-RUN", line)] += count
        return VMState(dict(lines))

    async def chains(self):
        """Return the file names of each disk's layers, by their live nodes."""
        async with qmpblock.connect(self.vm.second_monitor_path) as controller:
            disks = await controller.disks()
        self.active = [disk.chain.active for disk in disks]
        return tuple(tuple(Path(layer.file).name for layer in disk.chain.layers) for disk in disks)

    async def guest_moves(self, what="acked"):
        """See that the guest's writes are acknowledged (or `flushed`) on every disk."""
        for number, _ in enumerate(self.specs):
            first, deadline = None, asyncio.get_running_loop().time() + _STALL
            while True:
                seen = await self.vm.guest.progress(number)
                assert (seen.bad, seen.errors) == (0, 0), seen
                first = first or seen
                if getattr(seen, what) > getattr(first, what):
                    break
                late = asyncio.get_running_loop().time() > deadline
                assert not late, f"the guest hangs: {seen}\n{await self.vm.diagnose()}"
                await asyncio.sleep(0.005)

    async def _note_progress(self):
        self.progress = [await self.vm.guest.progress(n) for n, _ in enumerate(self.specs)]

    # going on after the controller died

    async def go_on(self, way):
        """Undo, carry on, or do the same again; nothing is left to recover then."""
        if way == "again":
            try:
                await run(self.vm.monitor_path, self.operation.request(self.images))
            except RequestError:
                self.refused = True
        async with qmpblock.connect(self.vm.monitor_path) as controller:
            if way != "again":
                await controller.recover(dry_run=True)
                await controller.recover(carry_on=way == "carry-on")
            left = await controller.recover(dry_run=True)
            assert left == [], f"{self.label}: {left}"
            left = await controller.recover()
            assert left == [], f"{self.label}: {left}"
        if way == "again":
            # Done by the second if not by the first; the first's result is no error but a fact.
            await self.is_done()

    async def hurry(self):
        """Take the speed from a job that was left."""
        for job in await self.vm.execute("query-block-jobs"):
            await self.vm.execute("block-job-set-speed", device=job["device"], speed=0)

    async def is_done(self):
        """See that the disks are as documented."""
        assert await self.chains() == self.operation.chains
        await self.operation.check_done(self.vm.monitor_path, self.images)

    async def settled(self):
        """The VM lives, is as before or as documented, and no write is lost.

        And nothing is left but that: no lock, job, export, node, journal, socket, file.
        """
        await self.guest_moves()
        chains = await self.chains()
        wanted = [self.before]
        if self.matrix.reference is not None:
            after = self.matrix.reference.after
            wanted = [after] if chains == self.operation.chains else [self.before]
        else:
            assert chains == self.operation.chains
            wanted = [await self.state()]
            ours = [line for line in wanted[0].lines if "qmpblock" in line]
            assert self.operation.leaves_nodes == bool(ours), ours
            assert all(line.startswith(("node:", "edge:", "device:")) for line in ours), ours
        await self._is(wanted[0])
        await self._note_progress()
        await self.operation.check_kept(self, self.bounds(more=0))
        await self.operation.check_settled(self.vm, self.images)
        done = []
        for number, _ in enumerate(self.specs):
            done.append(await self.vm.guest.stop_stress(number))
            assert (done[-1].bad, done[-1].errors) == (0, 0), done[-1]
            assert await self.vm.guest.check(number) > 0
        await self.vm.quit()
        for number, end in enumerate(done):
            layer = self.active[number]
            await self._image_holds(
                number, Path(layer.file), layer.format, end.acked, end.issued, chains[number]
            )

    async def _is(self, wanted):
        deadline = asyncio.get_running_loop().time() + _SETTLE
        while True:
            now = self._without_kept(await self.state(), wanted)
            # Relaxed only where QEMU itself leaves files open for writing after a cancelled job.
            same = _without_modes if self.operation.scars else _same
            if same(now) == same(wanted):
                return
            if asyncio.get_running_loop().time() > deadline:
                left = "\n".join(
                    [
                        *(f"+ {line}" for line in now - wanted),
                        *(f"- {line}" for line in wanted - now),
                    ]
                )
                raise AssertionError(f"{self.label}: the VM is not as it should be:\n{left}")
            await asyncio.sleep(0.05)

    def _without_kept(self, now, wanted):
        """Return a state without what another copy can go on from, which stays where it was."""
        if not self.operation.keeps:
            return now
        more = now - wanted
        kept = {line for line in more if re.fullmatch(r"file: DIR/images/.*\.partial", line)}
        return VMState({line: count for line, count in now.lines.items() if line not in kept})

    async def _image_holds(self, number, path, fmt, acked, issued, chain=None):
        """A closed image: sound, reopenable as recorded, every write there, the rest as it was."""
        tools = self.matrix.tools
        if fmt == "qcow2":
            try:
                await tools.run(tools.img, "check", "-f", fmt, str(path))
            except ToolError as error:
                # Leaked clusters are what a qcow2 of a killed QEMU may have.
                assert (chain, error.returncode) == (None, 3), error
        printed = await tools.run(
            tools.img, "info", "-U", "--backing-chain", "--output=json", "-f", fmt, str(path)
        )
        recorded = [Path(layer["filename"]).name for layer in json.loads(printed)]
        assert chain is None or tuple(recorded) == chain
        names = [layer.get("backing-filename", "") for layer in json.loads(printed)]
        assert not any(name.startswith("json:") for name in names), names
        data = await self.matrix.content_of(path, fmt)
        spec, before = self.specs[number], self.matrix.content[number]
        start, stop = spec.offset, spec.offset + spec.length
        verdict = check_acknowledged(data[start:stop], spec, acked, issued)
        assert verdict.ok, f"{self.label}: {path.name}: {verdict}"
        assert len(data) == len(before)
        for name, part in (("before", slice(0, start)), ("after", slice(stop, None))):
            assert data[part] == before[part], f"{self.label}: {path.name} changed {name} the area"

    # QEMU dies

    async def die_under(self, request, number, moment):
        """Kill QEMU under a controller in this process; what it says must be right."""
        struck = asyncio.Event()

        async def die():
            struck.set()
            # A guest that is paused cannot answer; what it said before is a bound, too.
            if (await self.vm.execute("query-status"))["running"]:
                await self._note_progress()
            await self.vm.kill()

        @contextlib.asynccontextmanager
        async def connect(address):
            async with qmpblock.connect(address) as controller:
                deadly(controller.monitor, number, moment, die, self.trace)
                yield controller

        with contextlib.suppress(MonitorError):  # of a connection that is closed, or not made
            try:
                await run(self.vm.monitor_path, request, connect)
            except DisconnectedError as error:
                self.standing = error.standing
        died = struck.is_set()
        if died:
            # Of commands under way together another one may hear of it before it has died.
            async with asyncio.timeout(_STALL):
                while self.vm.running:
                    await asyncio.sleep(0.001)
        assert self.vm.running is not died, self.standing
        if died:
            self.trace = self.trace[:number]  # what it sent to a QEMU that lived
        return died

    async def die_together(self, request, number, moment):
        """Kill QEMU and its controller, the controller last."""
        dying = asyncio.ensure_future(
            self.matrix.graveyard.control(self.vm, request, number, moment, [self.vm.pid])
        )
        self.vm.expect_exit()
        while not dying.done():
            try:
                self.progress = [await self.vm.guest.progress(n) for n, _ in enumerate(self.specs)]
            except GuestError:  # its line closed: it is dead
                break
        died, self.trace = await dying
        if not died:
            return False
        await self.vm.wait(_STALL)
        return True

    async def images_hold(self):
        """QEMU is gone: the image that is named holds every flushed write, the rest is tidy."""
        chain = [disk.active.path for disk in self.vm.disks]
        begun, ended = self._how_far()
        named = await self._recover_images(chain) or self._named()
        start = [str(path) for path in chain]
        if not self.operation.moves:
            # Of several disks only the one at work.
            assert named is None or set(named) <= set(start), self.standing
        elif ended:
            # The journal has gone; a controller that lives still knows, and says it.
            done = [str(self.images / layers[0]) for layers in self.operation.chains]
            assert (named is None) == (self.standing is None), self.standing
            # An overlay that nobody has written to may be given up to the very end.
            assert named in (None, done) or not self.operation.runs_a_job, self.standing
            start = named or done
        elif begun:
            assert named, self.standing
            start = named
        else:
            assert named in (None, start), self.standing
        for number, file in enumerate(start):
            fmt = "raw" if file.endswith(".raw") else "qcow2"
            seen = self.progress[number]
            bound = seen.acked if self.quiet else seen.flushed
            await self._image_holds(number, Path(file), fmt, bound, seen.issued + 100_000)
        assert not list(self.state_directory.glob("*.journal"))
        files = {path.name for path in self.images.iterdir()}
        known = {path.name for path in self.matrix.built.directory.iterdir()}
        used = {Path(file).name for file in start}
        if self.operation.keeps:
            used |= {path.name for path in self.images.glob("*.partial")}
        assert files - known <= used, files
        await self._recover_images(chain, again=True)

    async def _recover_images(self, chain, again=False):
        """Do what `recover IMAGE...` does, its dry run first; return which images it names."""
        planned = await qmpblock.recover_images(chain, dry_run=True)
        found = await qmpblock.recover_images(chain)
        assert found == planned
        if again or self.standing is not None:
            assert found == []  # the controller that outlived QEMU did it by itself
        if not found:
            return None
        [one] = found
        assert not set(one.verdict.start) & {*one.verdict.stale, *one.removed}
        pivots = self.operation.chains[0][0] != chain[0].name and self.operation.runs_a_job
        stale = [Path(file).name for file in one.verdict.stale]
        moved = [str(path) for path in chain] != list(one.verdict.start)
        assert stale == ([path.name for path in chain] if pivots and moved else [])
        return list(one.verdict.start)

    def _how_far(self):
        """Return whether the journal had been written, and whether it was gone again."""
        locks = [
            n for n, one in enumerate(self.trace) if one.startswith("object-add qmpblock-disk")
        ]
        # After the last lock it looks for what others left, holds the VM and asks whose the images
        # are, query-status being the last of it; then comes the journal.
        asked = locks and [n for n in range(locks[-1], len(self.trace)) if self._asks(n)]
        begun = bool(asked) and len(self.trace) > asked[0] + 1
        # When it is gone iothreads may poll again, which takes that lock, and then the disks' go.
        later = self.trace[asked[0] :] if asked else []
        ends = ("object-del qmpblock-disk", f"object-add {POLLING_LOCK}")
        return begun, any(one.startswith(ends) for one in later)

    def _asks(self, number):
        return self.trace[number].startswith("query-status")

    def _named(self):
        """Return the images that the controller's error says to start from, if it says any."""
        if self.standing is None:
            return None
        match = re.search(r"start the VM from (.+?): ", self.standing)
        return match[1].split(", ") if match else None


def _recovery(way, request):
    """Return what dying.py is asked to do after a controller died; `request`: what that one was."""
    return request if way == "again" else {"do": "recover", "carry_on": way == "carry-on"}


async def _unless_busy(address, request):
    """Do what a request says, unless another controller is at work there."""
    with contextlib.suppress(BusyError):
        await run(address, request)


def _moved(image, directory):
    """Return the same image, and those below, in another directory."""
    backing = None if image.backing is None else _moved(image.backing, directory)
    return dataclasses.replace(image, path=directory / image.path.name, backing=backing)


def _same(state):
    return Counter(state.lines)


def _without_modes(state):
    """Return the state's lines, whether open for writing or not, with or without permissions."""
    lines = Counter()
    for line, count in state.lines.items():
        line = line.replace(", writable,", ", read-only,").replace(" and writing", "")
        lines[re.sub(r" may .*, shares .*", "", line)] += count
    return lines
