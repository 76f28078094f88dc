"""The kill matrix of migrations: whoever has a part in one is struck at every command of it.

One run to the end tells the commands that a migration sends, to both QEMUs. Then, before and after
each that comes once anything is changed, with a pair of VMs of its own whose guest writes all the
time, those of a row are struck, and what is left is recovered. One of both has the guest then, or
none where a person is asked or its QEMU has ended; it reads back what it wrote, nothing of ours is
left, and the next attempt succeeds. Of what was only stopped, or is neither of both, nobody is
asked: one of both has the guest, as soon as it goes on again.
"""

import asyncio
import contextlib
import os
import signal
import sys
from collections import Counter
from dataclasses import dataclass

from chains import convert
from disturbed import locks, nothing_of_ours, writes_on
from dying import deadly
from killing import MOMENTS, Graveyard
from migrating import arrived, overlying, snapshot, spec, stressed
from migrationblows import STALL, blow, impatient
from migrationoutcomes import INTERRUPTED, allowed
from migrationsights import Sights
from nbdservers import HOST, make_credentials_of
from ports import free_ports
from rounds import slice_of_soak

import qmpblock
from qmpblock.errors import CommandError, DisconnectedError, UndecidedError
from qmpblock.migration import arbiter
from qmpblock.migration.journal import journals
from qmpblock.migration.states import Phase, Side
from qmpblock.testing import Tools, build, check_acknowledged, parse_scenario
from qmpblock.testing.postmortem import examine

DISK = """
about: A disk.
disks:
  - {name: d0, images: [{size: 20M, content: [write 0 8M 0xaa]}], attach: {id: vd0}}
"""  # which ends where the guest's writes do: thousands of points look into all of it
_IMAGE = "images: [{{format: {}, {}size: 20M, content: [write 0 8M 0xaa, write 16M 4M 0x00]}}]"
# Of an encrypted image what was never written reads as noise: there are zeros for the guest's area.
_TWO = """
about: Two disks.
disks:
  - {{name: d0, {one}, attach: {{{attach}, id: vd0}}}}
  - {{name: d1, {other}, attach: {{{attach}, id: vd1}}}}
"""


_CHAIN = DISK.replace("0xaa]}", "0xaa]}, {size: 20M}")


@dataclass(frozen=True)
class Shape:
    """What VMs are struck, and how their migration is.

    :ivar top: whether the active layer alone goes over, onto the source's own backing image.
    :ivar tls: the kind of credentials with which it goes by TCP; empty: not so.
    :ivar daemon: whether a storage daemon may have the destination's images without being asked.
    """

    scenario: str = DISK
    shared: bool = False
    top: bool = False
    tls: str = ""
    daemon: bool = False


#: Other shapes than that of one disk which is copied.
SHAPES = {
    "shared": Shape(shared=True),
    "two scsi": Shape(
        _TWO.format(
            one=_IMAGE.format("qcow2", ""),
            other=_IMAGE.format("qcow2", ""),
            attach="device: virtio-scsi, iothread: one",
        ),
        daemon=True,  # before QEMU 8.0
    ),
    "raw and luks": Shape(
        _TWO.format(
            one=_IMAGE.format("raw", ""),
            other=_IMAGE.format("luks", "secret: geheim, "),
            attach="device: virtio-blk",
        )
    ),
    "top": Shape(_CHAIN, top=True),
    "x509": Shape(tls="x509"),
    "psk": Shape(tls="psk"),
}
#: What is struck. A controller that dies is followed by a recovery; `hangs`: the QEMU is stopped.
STRUCK = (
    "controller",
    "controller, source",
    "controller, destination",
    "all",
    "controller; destination hangs",
    "source",
    "destination",
    "controller; two recover",
)


async def _snapshot(source, _):
    await snapshot(source, source.directory)


async def _bitmap(source, _):
    await source.execute("block-dirty-bitmap-add", node="d0", name="theirs")


async def _plug(_, destination):
    await destination.execute("device_add", driver="virtio-rng-pci", id="theirs", addr="1c")


async def _unplug(_, destination):
    await destination.execute("device_del", id="vd0")


async def _pause(source, _):
    if await _status(source) == "running":  # who holds its guest does not let it go on
        await source.execute("stop")
        await source.execute("cont")


#: What somebody else does at a command, to source and destination.
THEIRS = {
    "a snapshot": _snapshot,
    "a bitmap": _bitmap,
    "a device plugged in there": _plug,
    "a disk unplugged there": _unplug,
    "stopped and continued": _pause,
}
#: Those of the rows that tell of another shape what that changes.
TELLING = (
    "controller",
    "source",
    "destination",
    "all",
    "controller; destination hangs",
    "controller; two recover",
)
#: What connecting to both sends, before a monitor can be struck.
_CONNECTING = ("query-status", "query-status")
_MOST = 1 << 24  # writes that a guest can have issued by any moment of it
_WAIT = 30.0  # seconds for a process to end
_BUSY = "given up before it was struck"  # on a busy host so little patience ends, too, what is well
_TRIES = 5  # to strike, there
_REDS = 8  # points that fail, after which the others are not tried


class Matrix:
    """All rows of the matrix of one sort of migration. `async with`.

    :param start_qemu: the fixtures: `start_destination`, `directory`, `qemu` likewise.
    :param host: on which destinations are started, if that is another one.
    :param shape: of the VMs; None: one disk, which is copied.
    :param options: of the migration.
    """

    def __init__(
        self, start_qemu, start_destination, directory, qemu, host=None, shape=None, **options
    ):
        self._shape = shape or Shape()
        self._start = start_qemu, start_destination
        self._there = {} if host is None else {"qemu": host.program(qemu)}
        if self._shape.shared:
            self._there["shared"] = options["memory_only"] = True
        if self._shape.top:
            options["layers"] = "top"
        self._credentials = ()
        self._directory = directory
        self._host = host
        self._tools = Tools.of(qemu)
        self._options = options
        self._graveyard = Graveyard()
        self._count = 0
        self._started = []
        self._struck = ""
        self.commands = self._first = 0
        self.outcomes = Counter()
        self.sights = Sights(daemon=self._shape.daemon or options.get("storage_daemon", False))

    async def __aenter__(self):
        if self._shape.tls:
            folder = make_credentials_of(self._shape.tls, self._directory / "tls")
            self._credentials = str(folder / "client"), str(folder / "server")
        await self._graveyard.__aenter__()
        source, destination = await self._pair()
        died, trace = await self._control(source, destination, 0, "before", [])
        assert not died
        await _whole(destination)
        await self._put_away()
        # What is asked before is asked of both, and nothing is there yet.
        self._first = next(n for n, sent in enumerate(trace, 1) if sent.startswith("object-add"))
        self.commands = len(trace)
        return self

    async def __aexit__(self, *error):
        await self._graveyard.__aexit__(*error)

    def points(self):
        """Yield (number, moment) of every point, once anything is changed."""
        for number in range(self._first, self.commands + 1):
            for moment in MOMENTS:
                yield number, moment

    async def strike(self, struck, number, moment):
        """Strike at one point, and see what comes of it; False: it was over before."""
        for _ in range(_TRIES):
            died, outcome = await self._strike(struck, number, moment)
            if outcome != _BUSY:
                break
        self.outcomes[outcome] += died or outcome == _BUSY
        return died

    async def _strike(self, struck, number, moment):
        how, settled, self._struck = self._besides, False, struck
        if struck in ("source", "destination"):
            how = self._under
        elif struck in INTERRUPTED:
            how = self._interrupted
        elif struck in THEIRS:
            how = self._disturbed
        self._started.clear()
        try:
            died, outcome = await how(struck, number, moment, *await self._pair())
            settled = outcome != "a person decides"
        except BaseException as error:
            error.add_note(f"{struck} struck {moment} command {number} of {self.commands}")
            for vm in self._started:  # they are gone when the others have been struck
                error.add_note(examine(vm).summary())
            raise
        finally:
            await self._put_away()
            if not settled:  # who would take it away; the next has its own
                for journal in journals():
                    journal.remove()
        return died, outcome

    async def _pair(self):
        start_qemu, _ = self._start
        self._count += 1
        room = self._directory / f"pair{self._count}"
        if self._credentials:
            port = free_ports(2)  # of the disks, and of the memory
            self._options["over"] = f"nbds://127.0.0.1:{port}/?tls-hostname={HOST}"
        built = await build(parse_scenario(self._shape.scenario, "source"), room, self._tools)
        source = await start_qemu(built, guest=True)
        self._started.append(source)
        await stressed(source)
        destination = await self._destination(source)
        for vm in (source, destination):
            vm.expect_exit()
        self._before = [await source.guest.progress(n) for n, _ in enumerate(source.disks)]
        return source, destination

    async def _destination(self, source):
        if self._shape.top:
            room = self._directory / f"pair{self._count}/{len(self._started)}"
            vm = await overlying(self._start[0], source, room, self._tools, guest=True)
        else:
            vm = await self._start[1](source, **self._there)
        self._started.append(vm)
        return vm

    def _addresses(self, source, destination):
        there = destination.monitor_path if self._host is None else self._host.address(destination)
        return source.monitor_path, there

    @contextlib.asynccontextmanager
    async def _migrating(self, source, destination, number=0, moment="before", die=None, stall=60):
        """Migrate under a controller that lives, which calls `die` at one of its commands.

        That is called with the phase in which it then is.
        """
        job, looks = None, []

        async def fall():
            await die(Phase.CHECKED if job is None else job.phase)
            looking = self.sights.look(self._struck, source, destination)
            looks.append(asyncio.create_task(looking))  # beside what the controller does of it

        here, there = self._addresses(source, destination)
        trace = list(_CONNECTING)
        ours, theirs = self._credentials or (None, None)
        try:
            async with (
                qmpblock.connect(here, stall=stall, tls_creds=ours) as one,
                qmpblock.connect(there, stall=stall, tls_creds=theirs) as other,
            ):
                for vm in (one, other):
                    deadly(vm.monitor, number, moment, fall, trace)
                async with qmpblock.migrate(one, other, **self._options) as job:
                    yield job
        finally:
            await asyncio.gather(*looks)

    async def _put_away(self):
        for vm in self._started:
            await vm.kill()

    async def _control(self, source, destination, number, moment, victims):
        _, there = self._addresses(source, destination)
        what = {"do": "migrate", "destination": there, **self._options}
        if self._credentials:
            what["credentials"] = self._credentials
        pids = [vm.pid for vm in victims]
        return await self._graveyard.control(source, what, number, moment, pids)

    # -- a controller that dies

    async def _besides(self, struck, number, moment, source, destination):
        victims = [
            vm
            for side, vm in (("source", source), ("destination", destination))
            if (side in struck and "hangs" not in struck) or struck == "all"
        ]
        died, _ = await self._control(source, destination, number, moment, victims)
        if not died:
            await _whole(destination)
            return False, ""
        for vm in victims:
            await vm.wait(_WAIT)
        if "hangs" in struck:
            os.kill(destination.pid, signal.SIGSTOP)
        try:
            return True, await self._recovered(struck, source, destination)
        finally:
            if "hangs" in struck and destination.running:
                os.kill(destination.pid, signal.SIGCONT)

    async def _recovered(self, struck, source, destination):
        """Recover, and see who has the guest; return who, for people."""
        addresses = self._addresses(source, destination)
        if "two" in struck:
            await _recover_twice(*addresses)
        try:
            with self.sights.of_recovery(struck):
                recovered = await qmpblock.recover_migration(*addresses, stall=10)
            said = "no migration" if recovered is None else str(recovered.done)
        except UndecidedError as error:
            assert error.remedy
            said = "a person decides"
        except qmpblock.Error:
            # Neither answers, and no journal says that there was anything.
            if source.running or list(journals()):
                raise
            said = "no migration"
        if said == "no migration" and source.running:  # but of it a disk's lock, say
            async with qmpblock.connect(source.monitor_path) as vm:
                await vm.recover()
        if "hangs" in struck:
            os.kill(destination.pid, signal.SIGCONT)
        running = [vm for vm in (source, destination) if await _runs(vm)]
        assert len(running) <= 1, f"both have the guest; {said}"
        if said == "a person decides":
            # One that was stopped may have had the guest by then, and goes on.
            assert running == ([destination] if "hangs" in struck and running else [])
            return said
        if not running:
            dead = destination if said == "True" else source
            assert not dead.running, f"nobody has the guest; {said}"
            await self._holds(dead)
            return f"images of the {'destination' if dead is destination else 'source'}"
        [owner] = running
        if said == "True":
            assert owner is destination
        await self._goes_on(owner, source, destination)
        return "destination" if owner is destination else "source"

    # -- a QEMU that dies under a controller that lives

    async def _under(self, struck, number, moment, source, destination):
        victim = source if struck == "source" else destination
        died, failed = asyncio.Event(), None

        async def die(_):
            died.set()
            await victim.kill()

        try:
            async with self._migrating(source, destination, number, moment, die, stall=10):
                pass
        except qmpblock.Error as error:
            failed = error
        if not died.is_set():
            await _whole(destination)
            return False, ""
        other = destination if victim is source else source
        if await _runs(other):
            if other is source and self._host is not None:  # by ssh its end is not seen
                await self._end_silent(source, destination, failed)
            await self._goes_on(other, source, destination, kept=_kept(failed))
            return True, "destination" if other is destination else "source"
        try:
            with self.sights.of_recovery(struck, living=True):
                await qmpblock.recover_migration(*self._addresses(source, destination))
        except UndecidedError:
            return True, "a person decides"
        except qmpblock.Error:
            assert list(journals()) == []
        if victim is destination:  # it was handed over by then, and has died as any VM does
            objects = [one["name"] for one in await source.execute("qom-list", path="/objects")]
            [left] = [name for name in objects if "qmpblock" in name]
            assert await arbiter.decided(source.control, left.split("-")[1]) is Side.DESTINATION
        assert not await _runs(other)
        await self._holds(victim)
        return True, f"images of the {struck}"

    # -- what is stopped or cut for a while, and a third process, under a controller that lives

    async def _interrupted(self, struck, number, moment, source, destination):
        stroke, failed = blow(struck, source, destination, self._directory, self._host), None
        clean = False
        with impatient():
            try:
                async with self._migrating(
                    source, destination, number, moment, stroke.strike, stall=STALL
                ) as job:
                    pass
                clean = not job.result.warnings
            except qmpblock.Error as error:
                failed = error
            finally:
                stroke.mend()
        if not stroke.struck and clean:
            await _whole(destination)
            return False, ""
        assert not (await _runs(source) and await _runs(destination)), f"both; {failed}"
        stayed = failed is not None and "the guest runs at the source" in str(failed)
        if not stayed:
            # All that has to do with it answers now, so that nobody is asked.
            addresses = self._addresses(source, destination)
            with self.sights.of_recovery(struck, living=True):
                recovered = await qmpblock.recover_migration(*addresses, stall=10)
            if failed is not None and stroke.struck:
                assert f"qmpblock recover unix:{source.monitor_path}" in str(failed)
            if recovered is None and failed is not None:  # but of it a disk's lock, say
                async with qmpblock.connect(source.monitor_path) as vm:
                    await vm.recover()
        running = [vm for vm in (source, destination) if await _runs(vm)]
        assert len(running) == 1, f"the guest is in {len(running)} of them; {failed}"
        [owner] = running
        if stayed:
            assert owner is source, failed
            await self._end_silent(source, destination, failed)
        await self._goes_on(owner, source, destination, kept=_kept(failed))
        outcome = "destination" if owner is destination else "source"
        if not stroke.struck:
            return False, _BUSY
        assert stayed or allowed(struck, stroke.phase, outcome), f"{outcome}, in {stroke.phase}"
        return True, f"{outcome} ({stroke.phase.value})"

    async def _end_silent(self, source, destination, failed):
        """Do what the error asks for of a destination that had all of the guest, and was silent."""
        for left in await locks(source):
            if left.endswith("-handover"):
                assert f"but the object {left}" in str(failed)
                assert "see that it is ended, and never continue it" in str(failed)
                assert await arbiter.decided(source.control, left.split("-")[1]) is Side.SOURCE
                await destination.kill()
                await source.execute("object-del", id=left)

    # -- somebody else who does something to either side meanwhile

    async def _disturbed(self, struck, number, moment, source, destination):
        came, failed = [], None

        async def strike(_):
            try:
                await THEIRS[struck](source, destination)
                came.append("done")
            except CommandError:
                came.append("refused")

        try:
            async with self._migrating(source, destination, number, moment, strike) as job:
                pass
        except qmpblock.Error as error:
            failed = error
        running = [vm for vm in (source, destination) if await _runs(vm)]
        owner = destination if failed is None else source
        assert running == [owner], f"{failed}"
        if failed is None:
            assert not job.result.warnings
            assert await _status(source) == "postmigrate"
        else:
            assert came == ["done"], failed
            assert "the guest runs at the source" in str(failed), failed
        # Where images are on both sides, a destination would have to be started with theirs, too.
        both_have = self._shape.shared or self._shape.top
        fits = not (both_have and struck == "a snapshot")
        await self._goes_on(owner, source, destination, kept=_kept(failed), again=fits)
        if not came:
            return False, ""
        return True, f"{came[0]}, {'gone over' if failed is None else 'given up'}"

    # -- the verdict

    async def _goes_on(self, owner, source, destination, *, kept=False, again=True):
        """See that the guest is whole, and where it stayed that the next attempt succeeds.

        :param kept: whether mirrors stay at the source, as the error said.
        :param again: whether there is to be one.
        """
        if owner is destination:
            await _whole(destination)
            return
        for number, _ in enumerate(source.disks):
            assert (await source.guest.progress(number)).bad == 0
        if not kept:
            await nothing_of_ours(source)
        assert await source.execute("query-block-exports") == []
        assert list(journals()) == []
        if destination.running:
            await destination.kill()
        if not again:
            await writes_on(source.guest)
            return
        destination = await self._destination(source)
        async with self._migrating(source, destination) as job:
            pass
        await arrived(source, destination, job.result)

    async def _holds(self, vm):
        """See that the images of a VM that has ended lack nothing."""
        raw = self._directory / "content"
        for number, disk in enumerate(vm.disks):
            await convert(self._tools, disk.active, disk.active.describe(), raw)
            data, its = raw.read_bytes(), spec(number)
            raw.unlink()
            assert data[: 8 << 20] == b"\xaa" * (8 << 20)
            area = data[its.offset : its.offset + its.length]
            verdict = check_acknowledged(area, its, self._before[number].flushed, _MOST)
            assert verdict.ok, verdict


async def kill_matrix(struck, *where, **options):
    """Strike before and after every command of this slice; `options` are those of `Matrix`.

    One that fails does not keep it from the others; they are raised together.
    """
    chosen, tried, total, reds = slice_of_soak(), 0, 0, []
    async with Matrix(*where, **options) as matrix:
        for number, moment in matrix.points():
            total += 1
            if chosen(total) and len(reds) < _REDS:
                try:
                    tried += await matrix.strike(struck, number, moment)
                except Exception as error:
                    reds.append(error)
    print(f"kill matrix: {tried} of {total} points, {struck}: {dict(matrix.outcomes)}")
    print(matrix.sights)
    if reds:
        raise ExceptionGroup(f"{struck}: {len(reds)} points failed", reds)


async def _whole(vm):
    """See that the guest that has come runs on, and reads back all that it wrote."""
    await nothing_of_ours(vm)
    guest = await vm.attach_guest()
    for number, _ in enumerate(vm.disks):
        before = (await guest.progress(number)).acked
        async with asyncio.timeout(_WAIT):
            while (await guest.progress(number)).acked <= before:
                await asyncio.sleep(0.01)
        end = await guest.stop_stress(number)
        assert (end.bad, end.errors) == (0, 0), end
        assert await guest.check(number) > 0


def _kept(failed):
    """Whether an error says that mirrors stay."""
    return failed is not None and "mirrors stay, paused" in str(failed)


async def _status(vm):
    return (await vm.execute("query-status"))["status"]


async def _runs(vm):
    """Whether a guest runs in it."""
    try:
        return vm.running and (await vm.execute("query-status"))["running"]
    except DisconnectedError:  # it is ending, and its process is not gone yet
        await vm.wait(_WAIT)
        return False


async def _recover_twice(source, destination):
    """Have two recover at once, from both sides, of whom one wishes that it goes on there."""
    processes = [
        await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "qmpblock", "recover", *words),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        for words in ((source,), (destination, "--continue"))
    ]
    for process in processes:
        said, _ = await process.communicate()
        assert process.returncode in (0, 1, 2, 3), said.decode()
        assert "Traceback" not in said.decode(), said.decode()
