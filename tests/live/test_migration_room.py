"""Room at the destination for what is copied: it is looked for before anything is done."""

import json
import os

import pytest
from chains import cli
from migrating import MIB, arrived, at, both, migrated, stays

import qmpblock
from qmpblock.errors import UnsupportedError
from qmpblock.host.fallocate import keep_size
from qmpblock.testing.faults import fill_up, small_file_system

pytestmark = pytest.mark.live

SHORT = "what is copied takes up to"


@pytest.fixture
async def small(vm_dir):
    """Mount a file system where a destination has its images; the disk is 64 MiB, 8 hold data."""
    try:
        async with small_file_system(vm_dir / "destination0", 40 * MIB) as directory:
            yield directory
    except UnsupportedError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("image", ["raw", "qcow2"])
async def test_too_little_is_refused_and_nothing_touched(
    image, begin, start_destination, small, invariant
):
    source = await begin()
    destination = await start_destination(source, image=image)
    filler = fill_up(small, leave=6 * MIB)
    file = destination.disks[0].active.path
    before = file.stat().st_blocks, file.stat().st_mtime_ns
    await invariant.begin(source)
    await invariant.begin(destination)
    words = ("migrate", source.monitor_path, destination.monitor_path)
    code, out, err = await cli(*words, "--json")
    assert (code, out) == (2, ""), err
    assert f"the file system of {file} has {6 * MIB} bytes free, and {SHORT}" in err
    assert "when it runs full QEMU would notice" in err
    assert "make room at the destination" in err
    with pytest.raises(UnsupportedError, match=SHORT):
        await migrated(source, destination)
    await stays(source, invariant)
    assert (await destination.execute("query-status"))["status"] == "inmigrate"
    await invariant.verify(destination)
    assert (file.stat().st_blocks, file.stat().st_mtime_ns) == before
    code, out, _ = await cli(*words, "--dry-run", "--json")
    assert (code, [one["name"] for one in json.loads(out)["findings"]]) == (2, ["room"])
    filler.unlink()  # still less than the disk has bytes, but no less than it holds
    invariant.forget(source)
    invariant.forget(destination)
    await arrived(source, destination, await migrated(source, destination))


async def test_what_the_image_takes_already_is_not_asked_for_again(begin, start_destination, small):
    source = await begin()
    destination = await start_destination(source, image="raw")
    fd = os.open(destination.disks[0].active.path, os.O_WRONLY)
    keep_size(fd, 0, 21 * MIB)  # all that there is in this disk, the guest's writes too
    os.close(fd)
    filler = fill_up(small, leave=MIB)
    words = ("migrate", source.monitor_path, destination.monitor_path, "--dry-run")
    code, out, err = await cli(*words)
    assert (code, SHORT in out + err) == (0, False), err
    result = await migrated(source, destination)
    filler.unlink()
    await arrived(source, destination, result)


async def test_another_attempt_goes_on_where_the_first_took_nearly_all(
    begin, start_qemu, start_destination, small, monkeypatch, invariant
):
    """Its mirrors are there, paused; what they copied is not asked for again."""
    source = await begin()
    destination = await start_destination(source)
    destination.expect_exit()
    with (
        at(monkeypatch, "ready", destination.kill),
        pytest.raises(qmpblock.Error, match="stay, paused"),
    ):
        await migrated(source, destination, storage_daemon=True)
    filler = fill_up(small, leave=5 * MIB)
    waiting = {"incoming": "defer", "extra": ["-S"], "guest": True, "machine": source.machine}
    again = await start_qemu(destination.disks, **waiting)
    invariant.forget(again)
    async with both(source, again) as vms, qmpblock.migrate(*vms, storage_daemon=True) as job:
        async for _ in job:
            pass
    assert [one.text for one in job.result.notices] == [
        "the disks' mirrors of an attempt before are gone on with"
    ]
    filler.unlink()
    await arrived(source, again, job.result)
