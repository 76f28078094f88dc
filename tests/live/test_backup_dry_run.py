"""A backup that is not made: what is said of it, that it is so, and that nothing was touched."""

import json
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from chains import cli
from fake_objects import dead
from fleecing import MIB
from jsonschema import Draft202012Validator
from untouched import OF_A_MAP, changing, every_file, now, state_of

import qmpblock
from qmpblock.backups.directory import open_backups, read_points
from qmpblock.changes.backupnote import BackupNote
from qmpblock.errors import Error
from qmpblock.names import (
    BACKUP_LOCK_FILE,
    backup_lock_name,
    begun_file,
    lock_names,
    new_run,
    point_file,
)
from qmpblock.testing.images import Tools, build
from qmpblock.testing.scenario import parse_scenario
from qmpblock.versioned import plain

pytestmark = pytest.mark.live

SCHEMA = Path(__file__).parents[2] / "docs/schema/backup-plan.schema.json"
TWO = """
about: Two disks, one of them a raw one.
disks:
  - images: [{size: 16M, content: [write 0 6M 0xaa]}]
  - images: [{format: raw, size: 16M, content: [write 0 3M 0xbb]}]
"""
ONE = "about: A disk.\nimages: [{size: 16M, content: [write 0 6M 0xbb]}]"
#: As a guest writes data and zeros, not at the end.
WRITES = ("write -P 7 1M 300k", "write -z 3M 1M")


@pytest.fixture
def begin(start_qemu, vm_dir, qemu_binary, invariant):
    async def started(scenario=TWO):
        tools = Tools.of(qemu_binary)
        vm = await start_qemu(await build(parse_scenario(scenario, "d"), vm_dir / "images", tools))
        invariant.forget(vm)  # bitmaps stay
        return vm

    return started


@contextmanager
def nothing_made(vm, place):
    """See that nothing is made on the host meanwhile, nor given another time."""

    def seen():
        roots = [one.lstat() for one in (vm.directory, place) if one.exists()]
        return every_file(vm.directory), [one.st_mtime_ns for one in roots]

    before = seen()
    yield
    assert seen() == before


async def foreseen(vm, place, **options):
    """Say what a backup would be, and see that nothing was touched by that."""
    state = await state_of(vm)
    asked = now(vm)
    with nothing_made(vm, place):
        async with qmpblock.connect(vm.monitor_path) as controller:
            planned = await controller.plan_backup(place, await controller.disks(), **options)
    of_a_map = any(one.kind == "full" for one in planned.disks) or planned.verify
    assert changing(vm, since=asked) <= (OF_A_MAP if of_a_map else set())
    assert await state_of(vm) == state
    return planned


async def backed_up(vm, place, **options):
    async with (
        qmpblock.connect(vm.monitor_path) as controller,
        controller.backup(place, await controller.disks(), **options) as job,
    ):
        pass
    return job.result


def check_made(planned, made):
    """See that what was made is what was said."""
    assert (planned.directory, planned.verify) == (made.directory, made.verified)
    for one, disk in zip(planned.disks, made.point.disks, strict=True):
        image = Path(made.directory, disk.file)
        assert (one.disk, one.source, one.size) == (disk.disk, disk.source, disk.size)
        assert (one.kind, one.reason, one.parent) == (disk.kind, disk.reason, disk.parent)
        name = Path(one.target).name
        assert name == planned.when + disk.file.removeprefix(made.point.when)
        assert Path(one.target).parent == image.parent
        taken = image.stat().st_blocks * 512
        assert taken <= one.room.needed < one.room.free
        if one.kind == "full":
            assert one.read <= one.write <= taken
        else:
            assert disk.copied <= one.write == one.read < one.size


@pytest.mark.parametrize("verify", [False, True], ids=["", "verified"])
async def test_what_is_said_is_made(verify, begin, vm_dir):
    """From the first backup on, into a directory that is not there, to an increment."""
    vm, place = await begin(), vm_dir / "b"
    planned = await foreseen(vm, place, verify=verify)
    assert [one.kind for one in planned.disks] == ["full", "full"]
    assert [one.read for one in planned.disks] == [6 * MIB, 3 * MIB]
    assert (planned.new, planned.warnings) == (True, ())
    old = vm.version < (10, 0, 0)
    assert planned.way == ("frozen layers" if old else "views")
    check_made(planned, await backed_up(vm, place, verify=verify))
    for node in ("d0", "d1"):
        for command in WRITES:
            await vm.qemu_io(node, command)
    planned = await foreseen(vm, place, verify=verify)
    assert [one.kind for one in planned.disks] == ["incremental", "incremental"]
    # What was written, in whole grains, and the disk's last one.
    assert [one.write for one in planned.disks] == [5 * 65536 + MIB + 65536] * 2
    assert not planned.new
    made = await backed_up(vm, place, verify=verify)
    check_made(planned, made)
    (place / made.point.disks[0].file).unlink()
    planned = await foreseen(vm, place, verify=verify)
    assert [one.kind for one in planned.disks] == ["full", "incremental"]
    said = f"the backup of vd0 would be full: {planned.disks[0].reason}"
    assert planned.warnings == (said,)
    check_made(planned, await backed_up(vm, place, verify=verify))


async def test_the_time_counts_what_an_increment_holds(begin, vm_dir):
    vm, place = await begin(ONE), vm_dir / "b"
    planned = await foreseen(vm, place, speed=MIB)
    made = await backed_up(vm, place)
    assert planned.seconds == made.point.disks[0].copied / MIB
    await vm.qemu_io("d0", WRITES[0])
    planned = await foreseen(vm, place, speed=MIB)
    made = await backed_up(vm, place)
    assert planned.seconds == made.point.disks[0].copied / MIB


def other_things(place):
    place.mkdir()
    (place / "holiday.jpg").touch()


def somebody_elses(place):
    with open_backups(place) as backups:
        backups.read()
        [point] = backups.points
        (place / f"{point.when}.json").unlink()
        of = replace(point.vm, name="another", uuid="b" * 36)
        backups.make(
            replace(point, vm=of, disks=(replace(point.disks[0], path="/x", source="/x"),))
        )


def two_directories(place):
    with open_backups(place) as backups:
        backups.read()
        [point] = backups.points
        when = "20990101T000000Z"
        disks = (replace(point.disks[0], file=f"{when}-vd0.qcow2"),)
        backups.make(replace(point, backups="ffffffff", when=when, disks=disks))


def unreadable_point(place):
    (place / "20261130T110500Z.json").write_text("{}")


def unreadable_begun(place):
    (place / begun_file("20261130T110500Z")).write_text("{}")


def linked_lock(place):
    (place / BACKUP_LOCK_FILE).unlink()
    (place / BACKUP_LOCK_FILE).symlink_to("elsewhere")


@pytest.mark.parametrize("spoil", [None, other_things, lambda place: place.touch()])
@pytest.mark.parametrize(
    "words",
    [
        {},
        {"kind": "incremental"},
        {"fleece_limit": 1},
        {"fleece": "/no/such/folder"},
        {"latency": -1.0},
        {"twice": True},
        {"none": True},
        {"below": "no"},
    ],
    ids=str,
)
async def test_a_first_one_is_refused_alike(words, spoil, begin, vm_dir):
    vm, place = await begin(ONE), vm_dir / words.get("below", ".") / "b"
    if spoil is not None and place.parent.exists():
        spoil(place)
    await refused_alike(vm, place, dict(words), always=bool(words) or spoil is not None)


@pytest.mark.parametrize(
    "spoil",
    [somebody_elses, two_directories, unreadable_point, unreadable_begun, linked_lock],
)
async def test_a_next_one_is_refused_alike(spoil, begin, vm_dir):
    vm, place = await begin(ONE), vm_dir / "b"
    await backed_up(vm, place)
    spoil(place)
    await refused_alike(vm, place, {})


async def refused_alike(vm, place, words, *, always=True):
    """See that what a backup is refused for it is refused for that is not made, in its words."""
    said = []
    words.pop("below", None)
    times = 0 if words.pop("none", False) else 2 if words.pop("twice", False) else 1
    async with qmpblock.connect(vm.monitor_path) as controller:
        disks = list(await controller.disks()) * times
        with nothing_made(vm, place):
            try:
                await controller.plan_backup(place, disks, **words)
            except Error as error:
                said.append((type(error), str(error), error.exit_code))
        if not said and not always:
            return
        try:
            async with controller.backup(place, disks, **words):
                pass
        except Error as error:
            said.append((type(error), str(error), error.exit_code))
    if not said and "fleece" in str(words):
        assert vm.version < (10, 0, 0)  # frozen layers keep nothing
        return
    assert len(said) == 2
    assert said[0] == said[1]


async def test_while_one_is_made(begin, vm_dir):
    vm, place = await begin(ONE), vm_dir / "b"
    other = vm_dir / "other"
    async with qmpblock.connect(vm.monitor_path) as controller:
        disks = await controller.disks()
        async with controller.backup(place, disks, speed=MIB) as job:
            for where in (place, other):
                said = []
                with nothing_made_at(where), pytest.raises(Error) as planned:
                    await controller.plan_backup(where, disks)
                said.append(str(planned.value))
                with pytest.raises(Error) as refused:
                    async with controller.backup(where, disks):
                        pass
                said.append(str(refused.value))
            assert said[0].startswith("another controller is at work on this disk")
            with pytest.raises(Error, match=r"a backup is being made in .*, by process"):
                await controller.plan_backup(place, disks)
            await job.set_speed(0)
    assert job.result is not None


@contextmanager
def nothing_made_at(place):
    there = place.exists()
    yield
    assert place.exists() is there


@pytest.mark.parametrize("made", [True, False])
async def test_bitmaps_of_one_that_died_are_seen_as_gone(made, begin, vm_dir):
    """As the next backup finds them: which count tells whether its point file is there."""
    vm, place = await begin(ONE), vm_dir / "b"
    first = (await backed_up(vm, place)).point
    status = place.stat()
    bitmaps = (("d0", first.disks[0].bitmap), ("d0", f"{first.disks[0].bitmap}-end"))
    note = BackupNote(
        str(place),
        status.st_dev,
        status.st_ino,
        point_file(first.when if made else "20200101T000000Z"),
        bitmaps,
        (),
        (),
    )
    gone = dead(new_run(), **plain(note))
    name = backup_lock_name(first.backups)
    await vm.execute("object-add", **{"qom-type": "secret", "id": name, "data": gone.text()})
    planned = await foreseen(vm, place)
    [one] = planned.disks
    assert one.kind == ("incremental" if made else "full")
    check_made(planned, await backed_up(vm, place))


async def test_a_disk_on_which_a_controller_died(begin, vm_dir):
    """The backup undoes first what it left; until then nobody knows what the disk will be."""
    vm, place = await begin(ONE), vm_dir / "b"
    async with qmpblock.connect(vm.monitor_path) as controller:
        [name] = lock_names([disk.device for disk in await controller.disks()])
    gone = dead(new_run())
    await vm.execute("object-add", **{"qom-type": "secret", "id": name, "data": gone.text()})
    state = await state_of(vm)
    with nothing_made(vm, place):
        code, out, err = await cli("backup", vm.monitor_path, place, "--dry-run")
    assert (code, out) == (1, "")
    assert "a controller that died left this disk in the middle of a change" in err
    assert "qmpblock recover ADDRESS" in err
    assert await state_of(vm) == state
    await backed_up(vm, place)


async def test_without_a_map_it_says_so(begin, vm_dir):
    """Somebody else has the one NBD server: a backup does not need it, a map does."""
    vm, place = await begin(ONE), vm_dir / "b"
    where = {"type": "unix", "data": {"path": str(vm_dir / "foreign")}}
    await vm.execute("nbd-server-start", addr=where)
    planned = await foreseen(vm, place)
    [one] = planned.disks
    assert (one.kind, one.read, one.write, one.room) == ("full", None, None, None)
    assert "how much vd0 holds cannot be told beforehand" in planned.warnings[0]
    await refused_alike(vm, place, {"verify": True})
    await backed_up(vm, place)
    planned = await foreseen(vm, place)  # of an increment the bitmap tells
    assert (planned.disks[0].write, planned.warnings) == (65536, ())
    await vm.execute("nbd-server-stop")


async def test_the_command(begin, vm_dir):
    vm, place = await begin(), vm_dir / "b"
    words = ("backup", vm.monitor_path, place, "--dry-run")
    with nothing_made(vm, place):
        code, out, err = await cli(*words, "--speed", "2M")
    assert (code, err) == (0, "")
    assert "-vd0.qcow2, 16M, full: there is no backup of this disk yet\n" in out
    assert "  at most 6M to read, 6M to write; room: " in out
    assert "b, which would be made; files are called by the time at which it begins\n" in out
    assert out.endswith("no backup was made (--dry-run)\n")
    code, _, err = await cli(*words[:-1])
    assert code == 0, err
    code, out, err = await cli(*words, "--json", "--incremental")
    assert code == 0, err
    told = json.loads(out)
    Draft202012Validator(json.loads(SCHEMA.read_text())).validate(told)
    [point] = read_points(place)
    assert [one["parent"] for one in told["disks"]] == [one.file for one in point.disks]
    code, out, err = await cli(*words)
    assert (code, err) == (0, "")
    assert f"incremental, on {point.disks[0].file}\n  at most 64K to read, 64K to write" in out
    (place / point.disks[0].file).unlink()
    code, out, err = await cli(*words)
    assert code == 4
    assert "warning: the backup of vd0 would be full: of what it would lie on" in err
    code, out, err = await cli(*words, "--incremental")
    assert (code, out) == (2, "")
    for wrong in (("list", place, "--dry-run"), (*words[1:], "--metrics", vm_dir / "m")):
        assert (await cli("backup", *wrong))[0] == 2
