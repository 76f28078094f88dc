"""What a QEMU, or whoever writes beside its images, claims of our records is not believed.

Locks are put into a VM as somebody in its QEMU would, and files beside its images as the user of
that QEMU would.
"""

import contextlib
import json
import multiprocessing
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from disturbed import until
from drawing import record
from fake_objects import dead
from journaling import of_pivot

import qmpblock
from qmpblock.changes.identity import identify
from qmpblock.changes.journal import Journal
from qmpblock.errors import Error
from qmpblock.testing.faults import Controller

pytestmark = [pytest.mark.live, pytest.mark.scenarios("chain-3.yaml")]
LOCK = "qmpblock-disk-vd0"
NOBODY = 65534
TIME = float(os.environ.get("QMPBLOCK_TEST_SWAPS", "1.5"))  # seconds of swapping
ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user for a while")


def state():
    return Path(os.environ["QMPBLOCK_STATE"])


async def claimed(vm, /, **changes):
    """Put the lock of a dead controller into a VM; return what it claims."""
    async with qmpblock.connect(vm.monitor_path) as controller:
        me = await identify(controller)
        device = (await controller.disk("vd0")).device
    wanted = record(**({"vm": me, "devices": (device.qom_path,)} | changes))
    text = dead(wanted.run, record=wanted.as_json()).text()
    await vm.execute("object-add", qom_type="secret", id=LOCK, data=text)
    return wanted


async def recovered(vm, **options):
    """Recover a VM, whatever comes of it."""
    async with qmpblock.connect(vm.monitor_path) as controller:
        try:
            return await controller.recover(**options)
        except Error as error:
            return error


async def pending_pivot(vm, run, disk):
    """Have a commit of the active layer wait to be finalized, under one of our names."""
    job = f"qmpblock-{run}-pivot"
    await vm.execute("block-commit", job_id=job, device=disk, auto_finalize=False)

    async def status():
        return [one["status"] for one in await vm.execute("query-jobs") if one["id"] == job]

    async def is_(wanted):
        return (await status()) == [wanted]

    await until(lambda: is_("ready"), "a job that is ready")
    await vm.execute("job-complete", id=job)
    await until(lambda: is_("pending"), "a job that is pending")


@pytest.mark.parametrize("lock", [True, False], ids=["a lock", "a job alone"])
async def test_the_journal_of_another_vm_is_not_touched(start_qemu, scenario, vm_dir, lock):
    """A has a job with the run of a change in B, and B's lock, word by word."""
    a, b = await start_qemu(scenario), await start_qemu(scenario)
    command = (sys.executable, "-m", "qmpblock", "commit", b.monitor_path, "vd0")
    async with Controller([*command, "--speed", "64K"], vm_dir) as controller:

        async def running():
            return [one for one in await b.execute("query-jobs") if one["status"] == "running"]

        await until(running, "a running job")
        controller.kill()
    text = await b.execute("qom-get", path=f"/objects/{LOCK}", property="data")
    run = json.loads(text)["run"]
    images = [path.active.path for path in b.disks]
    files = [*state().glob("*.journal"), *images[0].parent.glob("*.journal")]
    assert len(files) == 2
    before = {path: path.read_bytes() for path in files}
    if lock:
        await a.execute("object-add", qom_type="secret", id=LOCK, data=text)
    async with qmpblock.connect(a.monitor_path) as vm:
        root = (await vm.disk("vd0")).chain.root.name
    await pending_pivot(a, run, root)
    await recovered(a)
    assert {path: path.read_bytes() for path in files if path.exists()} == before
    # B is recovered as if nothing had been.
    await recovered(b)
    assert not any(path.exists() for path in files)
    await a.kill()
    await b.kill()


@ROOT
async def test_a_lock_does_not_lead_to_a_file(start_qemu, scenario, vm_dir, invariant):
    """A file of root's whose content the guest chose, an overlay or a log, is no journal."""
    vm = await start_qemu(scenario)
    victim, home = vm_dir / "victim", vm_dir / "evil"
    victim.write_text("precious")
    status = victim.stat()
    wanted = await claimed(
        vm,
        operation="allocate",
        pivot=True,
        job="qmpblock-deadbeef-pivot",
        top="qmpblock-deadbeef-0",
        nodes=("qmpblock-deadbeef-0",),
        top_file=str(vm_dir / "evil.qmpblock-deadbeef"),
        base_file=str(home),
        base_format="qcow2",
        files=(str(victim),),
        images=(str(home),),
    )
    forged = vm_dir / "evil.qmpblock-deadbeef.journal"
    made = {"made": str(victim), "dev": status.st_dev, "ino": status.st_ino}
    said = {"format": 1, "version": "0.1.0", **wanted.as_json()}
    forged.write_text(f"{json.dumps(said)}\n{json.dumps(made)}\n")
    forged.chmod(0o600)
    for options in ({"dry_run": True}, {}, {"carry_on": True}):
        await recovered(vm, **options)
        assert victim.exists()
        assert forged.exists()
    await vm.kill()


@pytest.mark.parametrize("uuid", ["../inside/x", "{inside}/x"])
async def test_carrying_on_makes_no_file_where_a_lock_says(start_qemu, scenario, vm_dir, uuid):
    """Its UUID is in a file's name."""
    vm = await start_qemu(scenario)
    inside = vm_dir / "inside"
    inside.mkdir()
    os.utime(inside, ns=(0, 0))
    async with qmpblock.connect(vm.monitor_path) as controller:
        me = await identify(controller)
    uuid = uuid.format(inside=inside)
    await claimed(vm, vm=replace(me, uuid=uuid))
    await recovered(vm, carry_on=True)
    assert inside.stat().st_mtime_ns == 0  # nothing was made there, not even for a moment
    assert list(state().glob("**/*.journal")) == []


def swap(images, victim, swapped):
    """As another user, put a link in the place of whatever journal there is, for ever."""
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    number = 0
    while True:
        for name in os.listdir(images):
            path = Path(images, name)
            if name.endswith(".journal") and not path.is_symlink():
                with contextlib.suppress(OSError):
                    path.rename(Path(images, f"moved-{number}"))
                    path.symlink_to(victim)
                    number += 1
                    swapped.value = number


@ROOT
def test_a_link_in_the_place_of_a_journal_is_not_written_to(vm_dir):
    """Its user puts one there as soon as it is made, again and again."""
    vm_dir.chmod(0o755)
    images = vm_dir / "images"
    images.mkdir()
    os.chown(images, NOBODY, NOBODY)
    victim = vm_dir / "victim"
    victim.write_text("of root's\n" * 100)
    before = (victim.read_bytes(), victim.stat().st_mtime_ns)
    image = images / "disk.qcow2"
    image.write_bytes(b"")
    forking = multiprocessing.get_context("fork")
    swapped = forking.Value("i", 0)
    swapper = forking.Process(target=swap, args=(str(images), str(victim), swapped), daemon=True)
    swapper.start()
    try:
        end = time.monotonic() + TIME
        while time.monotonic() < end:
            go_through(image)
            for left in images.glob("*.journal"):
                left.unlink(missing_ok=True)
    finally:
        swapper.kill()
        swapper.join()
    assert swapped.value > 0
    assert (victim.read_bytes(), victim.stat().st_mtime_ns) == before


def go_through(image):
    """Have a journal as a change has one."""
    try:
        journal = Journal.create(of_pivot(image), image)
    except Error:  # the link was there first
        return
    with contextlib.suppress(Error):
        journal.add(pivoted=False)
    with contextlib.suppress(Error):
        journal.restart()
    with contextlib.suppress(Error):
        journal.mark(pivoted=True)
    journal.remove()
