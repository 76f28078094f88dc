"""Images that are another QEMU's: before, during and after a migration nothing is touched.

Two QEMUs on one image, as on shared storage. The tiny guest writes all the time and goes on at
the destination, where in the end it reads back everything that was ever acknowledged.
"""

import asyncio

import pytest
from chains import cli
from disturbed import until

import qmpblock
from qmpblock.errors import UnsupportedError
from qmpblock.names import blocker_name
from qmpblock.qemu.ownership import Owner, look
from qmpblock.testing.images import Tools, build
from qmpblock.testing.scenario import parse_scenario
from qmpblock.testing.stamps import StressSpec

pytestmark = pytest.mark.live

QCOW2 = """\
about: A chain that two QEMUs see.
images:
  - {size: 64M, content: [write 0 48M 0xaa]}
  - {content: [write 0 64K 0xbb]}
"""
RAW = "about: A raw disk.\nimages:\n  - {format: raw, size: 64M, content: [write 0 1M 0xaa]}\n"
# Where the chain holds nothing, so that the guest allocates as it goes.
STRESS = StressSpec(offset=49 << 20, blocks=512, block_size=4096, queue_depth=4, seed=9, rate=300)
# The little memory of the tiny guest would be across at once.
SLOW = {"max_bandwidth": 64 << 10, "downtime_limit": 1}
FAST = {"max_bandwidth": 1 << 30, "downtime_limit": 300}


class Pair:
    """A source whose guest writes, and a destination that waits for it; one image."""

    def __init__(self, built, source, destination, uri):
        self.built = built
        self.source = source
        self.destination = destination
        self.uri = uri

    async def migrate(self, *, pause=False, slow=False):
        """Begin; with `pause`, the guest stands still before the images change hands.

        With `slow`, its memory does not get across before `hurry` is called.
        """
        if slow:
            await self.source.execute("migrate-set-parameters", **SLOW)
        on = ["return-path", *(["pause-before-switchover"] if pause else [])]
        await self.source.execute(
            "migrate-set-capabilities",
            capabilities=[{"capability": name, "state": True} for name in on],
        )
        await self.source.execute("migrate", uri=self.uri)

    async def hurry(self):
        await self.source.execute("migrate-set-parameters", **FAST)

    async def status(self, vm=None):
        vm = vm or self.source
        migration = await vm.execute("query-migrate")
        return (await vm.execute("query-status"))["status"], migration.get("status")

    async def switched(self):
        """Wait until the images have changed hands; the guest does not run yet."""
        await until(lambda: self._is(self.source, ("postmigrate", "completed")), "postmigrate")
        await until(lambda: self._is(self.destination, ("paused", "completed")), "the other side")

    async def _is(self, vm, wanted):
        return await self.status(vm) == wanted

    async def go_on(self):
        """Have the guest go on at the destination."""
        await self.destination.execute("cont")
        await self.destination.attach_guest()
        await asyncio.sleep(0.2)

    async def verify(self):
        """Have the guest read everything back, and see that the image is whole."""
        vm = self.destination if self.destination.guest else self.source
        await vm.guest.stop_stress(0)
        assert await vm.guest.check(0) > 0
        await self.source.quit()
        await self.destination.quit()
        for image in self.built.disks[0].active.chain():
            await image.check(self.built.tools)


@pytest.fixture
def pair(start_qemu, vm_dir, qemu_binary, invariant):
    async def start(text=QCOW2, *, incoming=None, extra=()):
        built = await build(
            parse_scenario(text, "shared"), vm_dir / "images", Tools.of(qemu_binary)
        )
        source = await start_qemu(built, guest=True, extra=extra)
        uri = incoming or f"unix:{vm_dir}/migration"
        destination = await start_qemu(built, guest=True, incoming=uri, extra=["-S"])
        invariant.forget(source)  # what a migration changes is no news
        invariant.forget(destination)
        await source.guest.stress(STRESS)
        return Pair(built, source, destination, uri)

    return start


def verbs(vm, disk, directory):
    """Yield every verb that reads or changes a disk: name, and what makes its coroutine."""

    async def chain_job(make):
        async with make:
            pass

    yield "map", disk.map
    yield "layers", disk.layers
    yield "layers by exports", lambda: disk.layers(local=False)
    yield "allocate", disk.allocate
    yield "allocate full", lambda: disk.allocate(full=True)
    yield "independent", lambda: disk.allocate(independent=True)
    yield "make room", lambda: disk.make_room(1 << 20)
    yield "keep ahead", lambda: disk.keep_ahead(1 << 20)
    yield "snapshot", lambda: disk.snapshot(directory / "overlay.qcow2")
    if len(disk.chain.layers) > 1:
        yield "stream", lambda: chain_job(disk.stream())
        yield "commit", lambda: chain_job(disk.commit())


async def state_of(vm):
    """Return what could have been touched: permissions, open files, objects, jobs, exports."""
    from qmpblock.testing.invariant import snapshot

    return await snapshot(vm.control, vm.pid, vm.image_directories())


async def all_refused(vm, directory, words):
    """See that every verb is refused with these words, and touches nothing."""
    before = await state_of(vm)
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        assert len(await controller.jobs()) == 0
        for name, verb in verbs(controller, disk, directory):
            with pytest.raises(UnsupportedError, match=words) as caught:
                await verb()
            assert caught.value.standing == "nothing was touched", name
            assert caught.value.exit_code == 2
            assert caught.value.remedy, name
        assert await controller.recover() == []  # nothing of ours is there: that can be said
    after = await state_of(vm)
    assert (after - before, before - after) == ([], [])


@pytest.mark.parametrize("text", [QCOW2, RAW], ids=["qcow2", "raw"])
async def test_nothing_touches_a_waiting_destination(text, pair, vm_dir):
    """A mere map activated its images: it then read zeros where the guest had written."""
    two = await pair(text)
    await all_refused(two.destination, vm_dir, "waits for a migration")
    await two.migrate()
    await two.switched()
    await two.go_on()
    await two.verify()


@pytest.mark.parametrize("text", [QCOW2, RAW], ids=["qcow2", "raw"])
async def test_nothing_touches_what_is_being_migrated(text, pair, vm_dir):
    two = await pair(text)
    await two.migrate(pause=True, slow=True)
    await until(lambda: two._is(two.source, ("running", "active")), "the migration")
    await all_refused(two.source, vm_dir, "is being migrated")
    assert await two.status() == ("running", "active")
    await two.hurry()
    await until(lambda: two._is(two.source, ("finish-migrate", "pre-switchover")), "the pause")
    await all_refused(two.source, vm_dir, "is being migrated")
    await two.source.execute("migrate-continue", state="pre-switchover")
    await two.switched()
    await all_refused(two.source, vm_dir, "was migrated away")
    await two.go_on()
    await all_refused(two.source, vm_dir, "was migrated away")
    async with qmpblock.connect(two.destination.monitor_path) as controller:
        [disk] = await controller.disks()
        assert (await disk.map()).length == disk.size  # here the images are now
    await two.verify()


async def test_a_destination_that_was_not_continued_yet(pair, vm_dir):
    """QEMU 11 activates the images when the guest goes on, 7.2 when it has come."""
    two = await pair()
    await two.migrate()
    await two.switched()
    async with qmpblock.connect(two.destination.monitor_path) as controller:
        [disk] = await controller.disks()
        found = await look(controller.monitor, [disk.device])
        if two.destination.version >= (10, 0, 0):
            assert found.owner is Owner.SOURCE
            with pytest.raises(UnsupportedError, match="vd0 are inactive"):
                await disk.map()
        else:
            assert found.owner is Owner.THIS
            assert (await disk.map()).length == disk.size
        await two.go_on()
        assert (await disk.map()).length == disk.size  # looked up while they were not ours
        await disk.allocate(0, 1 << 20)
    await two.verify()


async def test_the_command_says_so_and_lists_all_the_same(pair):
    two = await pair()
    code, out, err = await cli("map", two.destination.monitor_path, "vd0")
    assert (code, out) == (2, "")
    assert "waits for a migration" in err
    assert "Remedy: work on the VM in which the guest runs now" in err
    code, out, _ = await cli("disks", two.destination.monitor_path)
    assert code == 0
    assert "@1" in out
    assert (await cli("jobs", two.destination.monitor_path))[0] == 0
    assert await two.status(two.destination) == await two.status(two.destination)
    await two.migrate()
    await two.switched()
    await two.go_on()
    await two.verify()


# -- a migration that is to begin while something of ours is at work


async def refused_by_qemu(two, run):
    for attempt in (two.migrate(), two.source.execute("migrate", uri="exec:cat >/dev/null")):
        with pytest.raises(qmpblock.Error, match=f"{blocker_name(run)}' does not support live"):
            await attempt
    assert blocker_name(run) in await two.source.hmp("savevm now")


@pytest.mark.parametrize("how", ["stream", "commit", "allocate", "full", "snapshot"])
async def test_qemu_migrates_nothing_while_we_change_it(how, pair, vm_dir):
    """A stream, or thin allocation, went on writing at the source after the images had gone."""
    two = await pair()
    speed, seen = 8 << 20, asyncio.Event()
    async with qmpblock.connect(two.source.monitor_path) as controller:
        disk = await controller.disk("vd0")

        async def work():
            if how == "stream":
                async with disk.stream(speed=speed):
                    pass
            elif how == "commit":
                async with disk.commit(speed=speed) as job:
                    await seen.wait()
                    await job.set_speed(0)  # or it never catches up with the guest
            elif how == "allocate":
                await disk.allocate(speed=speed)
            elif how == "full":
                await disk.allocate(48 << 20, 1 << 20, full=True)
            else:
                await disk.snapshot(vm_dir / "images" / "overlay.qcow2")

        async def holding():
            names = (await controller.graph()).nodes
            return next((name for name in names if name.endswith("-no-migration")), None)

        working = asyncio.create_task(work())
        if how in ("stream", "commit", "allocate"):
            name = await until(holding, "the hold")
            await refused_by_qemu(two, name.split("-")[1])
            assert not working.done()
        seen.set()
        await working
        assert await holding() is None
        assert await two.source.execute("query-fdsets") == []
    if how in ("commit", "snapshot"):
        return  # the destination was started for another image
    await two.migrate()
    await two.switched()
    await two.go_on()
    await two.verify()


@pytest.mark.parametrize("how", ["stream", "commit", "allocate"])
async def test_where_qemu_cannot_be_held_the_migration_goes_first(how, pair, monkeypatch):
    """By a TCP monitor, say: what is under way is given up as soon as a migration is seen."""

    async def cannot(monitor, run):
        return False

    monkeypatch.setattr("qmpblock.changes.change.forbid_migration", cannot)
    two = await pair()
    async with qmpblock.connect(two.source.monitor_path) as controller:
        disk = await controller.disk("vd0")

        async def work():
            if how == "allocate":
                await disk.allocate(speed=4 << 20)
                return
            async with getattr(disk, how)(speed=4 << 20) as job:
                await until(lambda: job.progress and job.progress.done, "the job")
                async for _ in job:
                    pass

        working = asyncio.create_task(work())
        await asyncio.sleep(1)
        await two.migrate(pause=True)
        with pytest.raises(UnsupportedError, match="is being migrated"):
            await working
        assert await two.source.execute("query-jobs") == []
        assert await two.source.execute("query-block-exports") == []
    await until(lambda: two._is(two.source, ("finish-migrate", "pre-switchover")), "the pause")
    await two.source.execute("migrate-continue", state="pre-switchover")
    await two.switched()
    await two.go_on()
    await two.verify()


async def test_a_watch_waits_for_how_a_migration_ends(pair):
    """Cancelled, it goes on; gone through, it ends and says so."""
    two = await pair()
    told = []
    async with qmpblock.connect(two.source.monitor_path) as controller:
        disk = await controller.disk("vd0")
        watch = asyncio.ensure_future(disk.keep_ahead(4 << 20, tell=told.append))
        await until(lambda: told, "the first room")
        await two.migrate(pause=True)
        await until(lambda: two._is(two.source, ("finish-migrate", "pre-switchover")), "pause")
        await asyncio.sleep(0.5)
        assert not watch.done()
        await two.source.execute("migrate-continue", state="pre-switchover")
        await two.switched()
        await two.go_on()
        async with asyncio.timeout(120):
            with pytest.raises(UnsupportedError, match="was migrated away") as caught:
                await watch
        assert "what is reserved stays" in caught.value.standing
        objects = await two.source.execute("qom-list", path="/objects")
        assert not [one for one in objects if one["name"].startswith("qmpblock")]
    await two.verify()


async def test_a_migrated_source_is_not_recovered(pair):
    """What a dead controller left there would be undone in images that are somebody else's."""
    from drawing import RUN, record
    from fake_objects import dead

    two = await pair()
    holder = dead(RUN, record=record().as_json())
    name = "qmpblock-disk-vd0"
    await two.source.execute("object-add", qom_type="secret", id=name, data=holder.text())
    await two.migrate()
    await two.switched()
    await two.go_on()
    async with qmpblock.connect(two.source.monitor_path) as controller:
        assert await controller.recover(dry_run=True)
        with pytest.raises(UnsupportedError, match="was migrated away"):
            await controller.recover()
    assert await two.source.execute("qom-get", path=f"/objects/{name}", property="data")
    await two.verify()


async def test_a_vm_that_was_saved_to_a_file(start_qemu, vm_dir, invariant):
    """Until it goes on here: then its images are its own again."""
    vm = await start_qemu(parse_scenario(QCOW2, "saved"), guest=True)
    await vm.execute("migrate", uri=f"exec:cat >{vm_dir}/saved")

    async def saved():
        return (await vm.execute("query-status"))["status"] == "postmigrate"

    await until(saved, "postmigrate")
    async with qmpblock.connect(vm.monitor_path) as controller:
        disk = await controller.disk("vd0")
        with pytest.raises(UnsupportedError, match="saved to a file"):
            await disk.map()
        await vm.execute("cont")
        assert (await disk.map()).length == disk.size


@pytest.mark.parametrize("status", ["paused", "prelaunch"])
async def test_a_paused_vm_owns_its_images(status, start_qemu, vm_dir, invariant):
    vm = await start_qemu(parse_scenario(QCOW2, "paused"), extra=["-S"])
    if status == "paused":
        await vm.execute("cont")
        await vm.execute("stop")
        await invariant.begin(vm)
    assert (await vm.execute("query-status"))["status"] == status
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        assert (await disk.map()).length == disk.size
        await disk.allocate(0, 1 << 20)
        await disk.snapshot(vm_dir / "overlay.qcow2")
    invariant.forget(vm)
    nodes = await vm.execute("query-named-block-nodes", flat=True)
    assert not [one for one in nodes if one["node-name"].endswith("-no-migration")]
