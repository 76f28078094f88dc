"""A migration that failed is made again, and copies nothing twice."""

import tempfile

import pytest
from chains import cli
from migrating import KEPT, MIB, arrived, at, carried, machine, migrated, stays, storage_daemons

import qmpblock
from qmpblock.changes.change import Change

pytestmark = pytest.mark.live


@pytest.fixture
def again(start_qemu, invariant):
    """Give what starts a destination anew, with the images of one that has ended."""

    async def start(source, destination):
        waiting = {"incoming": "defer", "extra": ["-S"], "guest": True, "machine": source.machine}
        vm = await start_qemu(destination.disks, **waiting)
        invariant.forget(vm)
        return vm

    return start


@pytest.fixture
def failed(begin, start_destination, invariant, monkeypatch):
    """Give what has a migration fail in a phase, for its destination is killed."""

    async def fail(phase, text=None, **options):
        source = await begin(text or machine(2), rate=100)
        destination = await start_destination(source)
        destination.expect_exit()
        await invariant.begin(source)
        with at(monkeypatch, phase, destination.kill), pytest.raises(qmpblock.Error) as error:
            await migrated(source, destination, storage_daemon=True, **options)
        print(error.value)
        return source, destination, str(error.value)

    return fail


async def jobs(vm):
    return {one["status"] for one in await vm.execute("query-jobs")}


@pytest.mark.parametrize("phase", ["ready", "memory", "active", "held"])
async def test_what_was_mirrored_is_not_mirrored_again(phase, failed, again, vm_dir, monkeypatch):
    """The disks hold 8 MiB each, which the guest does not write to; it does elsewhere."""
    source, destination, said = await failed(phase)
    assert KEPT in said
    assert (await source.execute("query-status"))["status"] == "running"
    assert await jobs(source) <= {"paused", "standby"}
    assert storage_daemons(vm_dir) == []  # nothing but what is in QEMU is left
    before = [(await source.guest.progress(number)).issued for number in range(2)]
    destination = await again(source, destination)
    sent = carried(monkeypatch)
    result = await migrated(source, destination)
    assert [one.text for one in result.notices] == [
        "the disks' mirrors of an attempt before are gone on with"
    ]
    ends = await arrived(source, destination, result)
    written = [(end.issued - had) * 4096 for end, had in zip(ends, before, strict=True)]
    copied = [disk.copied for disk in result.disks]
    print(f"written since: {written}; copied: {copied}; over the wires: {sent}")
    for number, bound in enumerate(written):
        assert copied[number] <= bound + MIB // 2
        assert sent[number] <= bound * 1.02 + MIB  # with the head of each request


@pytest.mark.parametrize("device", ["virtio-blk", "virtio-scsi"])
async def test_a_copy_that_was_not_through_is_gone_on_with(device, failed, again):
    disks = machine(2, device=device, iothread="one")
    source, destination, said = await failed("copying", disks, speed=4 * MIB)
    assert KEPT in said
    destination = await again(source, destination)
    await arrived(source, destination, await migrated(source, destination))


async def test_an_image_that_was_written_to_since_is_copied_anew(failed, again):
    source, destination, _ = await failed("memory")
    with destination.disks[0].active.path.open("r+b") as image:
        image.write(b"Q")  # as was there: of QFI\xfb
    destination = await again(source, destination)
    result = await migrated(source, destination, storage_daemon=True)
    assert result.notices == ()
    assert min(disk.copied for disk in result.disks) >= 8 * MIB
    await arrived(source, destination, result)


async def test_whoever_wants_none_recovers(failed, invariant):
    source, _, _ = await failed("memory")
    code, _, err = await cli("recover", source.monitor_path)
    assert code == 0, err
    await stays(source, invariant)


async def test_it_can_fail_again_and_again(failed, again, monkeypatch):
    source, destination, _ = await failed("memory")
    for _ in range(2):
        destination = await again(source, destination)
        destination.expect_exit()
        with at(monkeypatch, "held", destination.kill), pytest.raises(qmpblock.Error, match=KEPT):
            await migrated(source, destination)
    destination = await again(source, destination)
    result = await migrated(source, destination)
    assert len(result.notices) == 1
    await arrived(source, destination, result)


@pytest.mark.parametrize("lost", [0, 1])
async def test_where_a_lock_cannot_be_written_none_is_kept(
    lost, begin, start_destination, invariant, vm_dir, monkeypatch
):
    """The last step of it: the wires are left by then, and the other lock may say that they are."""
    private = vm_dir / "tmp"
    private.mkdir(mode=0o700)
    monkeypatch.setenv("TMPDIR", str(private))
    monkeypatch.setattr(tempfile, "tempdir", None)
    source = await begin(machine(2), rate=100)
    destination = await start_destination(source)
    destination.expect_exit()
    await invariant.begin(source)
    leave, taken = Change.leave, []

    async def leave_without(self, **said):
        taken.append(sorted(self.record.locks)[lost])
        await source.execute("object-del", id=taken[-1])
        await leave(self, **said)

    with monkeypatch.context() as patch:
        patch.setattr(Change, "leave", leave_without)
        with at(patch, "memory", destination.kill), pytest.raises(qmpblock.Error) as failed:
            await migrated(source, destination, storage_daemon=True)
    assert len(taken) == 1
    assert "the guest runs at the source, where nothing of ours is left" in str(failed.value)
    await stays(source, invariant)
    assert list(private.iterdir()) == []
    destination = await start_destination(source)
    await arrived(source, destination, await migrated(source, destination, storage_daemon=True))
