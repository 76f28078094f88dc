"""The way out of a full file system, with not a byte free on it: on a real, small one."""

import contextlib
import os
import shutil
import signal
import sys

import pytest
from allocating import at_command
from chains import cli
from disturbed import nothing_of_ours, until

import qmpblock
from qmpblock.errors import CommandError, DisconnectedError, NoRoomError, RequestError
from qmpblock.testing.faults import Controller, fill_up, small_file_system
from qmpblock.testing.images import Tools, build
from qmpblock.testing.scenario import parse_scenario

pytestmark = pytest.mark.live
MIB = 1 << 20
SCENARIO = """
about: An overlay on a small file system, over a base on a large one.
images:
  - {size: 64M, content: [write 0 2M 0xaa]}
  - {size: 64M, content: [write 1M 4M 0xbb]}
"""


def is_full(directory):
    """Whether not a byte can be written there."""
    trial = directory / "trial"
    try:
        with trial.open("wb") as file:
            file.write(b"x")
    except OSError:
        return True
    finally:
        trial.unlink(missing_ok=True)
    return False


@contextlib.asynccontextmanager
async def full(start_qemu, vm_dir, qemu_binary, *, guest=False):
    """Run a VM whose overlay lies on a file system with no byte free; yields it and that."""
    async with small_file_system(vm_dir / "small", 16 * MIB) as small:
        scenario = parse_scenario(SCENARIO, "no-room")
        built = await build(scenario, small / "images", Tools.of(qemu_binary))
        base = built.disks[0].active.chain()[1].path.resolve()
        shutil.move(base, vm_dir / base.name)
        base.symlink_to(vm_dir / base.name)
        vm = await start_qemu(built, guest=guest)
        fill_up(small)
        assert is_full(small)
        yield vm, small / "images", built
        if vm.running:
            await vm.quit()


@pytest.fixture
def elsewhere(vm_dir, monkeypatch):
    """Return a state directory that has room."""
    state = vm_dir / "state"
    monkeypatch.setenv("QMPBLOCK_STATE", str(state))
    return state


async def test_a_commit_frees_it(start_qemu, vm_dir, qemu_binary, invariant, elsewhere):
    async with full(start_qemu, vm_dir, qemu_binary) as (vm, small, built):
        code, _, err = await cli("commit", vm.monitor_path, "vd0")
        assert code == 0, err
        assert "no room beside" in err
        assert list(small.glob("*qmpblock*")) == []
        assert list(elsewhere.glob("*.journal")) == []
        await nothing_of_ours(vm)
        await vm.quit()
        base = built.disks[0].active.chain()[1].path.resolve()
        raw = vm_dir / "content.raw"
        words = ("convert", "-f", "qcow2", "-O", "raw", str(base), str(raw))
        await built.tools.run(built.tools.img, *words)
        data = raw.read_bytes()
    assert data[: 6 * MIB] == b"\xaa" * MIB + b"\xbb" * (4 * MIB) + bytes(MIB)
    invariant.forget(vm)


@pytest.mark.parametrize("command", ["job-complete", "job-finalize"])
async def test_both_die_on_the_way(
    command, start_qemu, vm_dir, qemu_binary, elsewhere, monkeypatch
):
    """Before and after the pivot: recover finds by the state directory which image is newest."""
    from qmpblock.changes import change

    async with full(start_qemu, vm_dir, qemu_binary) as (vm, small, built):
        top = built.disks[0].active.path.resolve()
        base = built.disks[0].active.chain()[1].path.resolve()
        async with qmpblock.connect(vm.monitor_path) as controller:
            disk = await controller.disk("vd0")

            async def nothing(*_):
                return None

            monkeypatch.setattr(change.Change, "after_disconnect", nothing)
            with (
                at_command(controller.monitor, command, vm.kill),
                pytest.raises(DisconnectedError),
            ):
                async with disk.commit() as job:
                    job.complete()
        assert is_full(small)
        [marker] = small.glob("*.elsewhere")
        [found] = await qmpblock.recover_images([top], dry_run=True)
        code, out, err = await cli("recover", "--check", str(top))
        assert code == 4
        # Another host that sees the same storage is told, too.
        with monkeypatch.context() as patching:
            patching.setenv("QMPBLOCK_STATE", str(vm_dir / "another"))
            code, out, err = await cli("recover", "--check", str(top))
            assert code == 4
            assert str(marker) in err
            assert "safe" not in out
        await qmpblock.recover_images([top])
        after = command == "job-finalize"
        assert found.verdict.start == (str(base if after else top),)
        assert list(small.glob("*qmpblock*")) == []
        assert list(elsewhere.glob("*.journal")) == []


async def test_giving_up_needs_no_room_either(
    start_qemu, vm_dir, qemu_binary, invariant, elsewhere
):
    async with full(start_qemu, vm_dir, qemu_binary) as (vm, small, _):
        command = (sys.executable, "-m", "qmpblock", "commit", vm.monitor_path, "vd0")
        async with Controller([*command, "--speed", "64K"], vm_dir) as controller:

            async def running():
                jobs = await vm.execute("query-jobs")
                return [job for job in jobs if job["status"] == "running"]

            await until(running, "a running job")
            controller.kill(signal.SIGINT)
            assert await controller.wait() == 130
        assert is_full(small)
        assert list(small.glob("*qmpblock*")) == []
        await nothing_of_ours(vm)
        # A controller that is killed is undone by the next one.
        async with Controller([*command, "--speed", "64K"], vm_dir) as controller:
            await until(running, "a running job")
            controller.kill()
        code, _, err = await cli("recover", vm.monitor_path)
        assert code == 0, err
        assert list(small.glob("*qmpblock*")) == []
        await nothing_of_ours(vm)
    invariant.forget(vm)


async def test_a_snapshot_to_another_file_system(
    start_qemu, vm_dir, qemu_binary, invariant, elsewhere
):
    """Relief for the guest: it writes there from then on."""
    async with full(start_qemu, vm_dir, qemu_binary, guest=True) as (vm, small, _):
        async with qmpblock.connect(vm.monitor_path) as controller:
            disk = await controller.disk("vd0")
            await disk.snapshot(vm_dir / "relief.qcow2")
        await vm.guest.fill(0, 32 * MIB, MIB, 0x77)
        await vm.guest.flush(0)
        assert is_full(small)
        await nothing_of_ours(vm)
    invariant.forget(vm)


async def test_a_pivot_that_fails_can_still_be_marked(
    start_qemu, vm_dir, qemu_binary, invariant, elsewhere
):
    """The mark is taken back, with no byte free where it is: its room was reserved."""
    async with small_file_system(vm_dir / "states", 4 * MIB) as states:
        os.environ["QMPBLOCK_STATE"] = str(states)  # the fixture restores it
        async with full(start_qemu, vm_dir, qemu_binary) as (vm, _, _):
            async with qmpblock.connect(vm.monitor_path) as controller:
                disk = await controller.disk("vd0")
                seen = []

                async def cancel():
                    """Somebody cancels the job that is about to be finalized."""
                    [path] = states.glob("*.journal")
                    seen.append(path.read_text())
                    [job] = await vm.execute("query-jobs")
                    await vm.execute("job-cancel", id=job["id"])

                def fill():
                    fill_up(states)
                    assert is_full(states)

                with (
                    at_command(controller.monitor, "job-complete", fill),
                    pytest.raises(CommandError, match="concluded"),
                    at_command(controller.monitor, "job-finalize", cancel),
                ):
                    async with disk.commit() as job:
                        job.complete()
                assert '{"pivoted": true' in seen[0]
                await disk.refresh()
                assert len(disk.chain.layers) == 2
            (states / "filler").unlink()
            await nothing_of_ours(vm)
        invariant.forget(vm)


async def test_no_room_for_the_state_either(
    start_qemu, vm_dir, qemu_binary, invariant, monkeypatch
):
    async with full(start_qemu, vm_dir, qemu_binary) as (vm, small, _):
        monkeypatch.setenv("QMPBLOCK_STATE", str(small / "state"))
        async with qmpblock.connect(vm.monitor_path) as controller:
            disk = await controller.disk("vd0")
            with pytest.raises(NoRoomError) as caught:
                async with disk.commit():
                    pass
            assert caught.value.standing == "nothing was changed"
            assert "QMPBLOCK_STATE" in caught.value.remedy
            with pytest.raises(NoRoomError):
                await disk.snapshot(vm_dir / "never.qcow2")
            assert not (vm_dir / "never.qcow2").exists()
        assert list(small.glob("*qmpblock*")) == []


async def test_no_room_for_the_state_alone(start_qemu, vm_dir, qemu_binary, invariant, monkeypatch):
    """Where the journal beside the image suffices, and where none is needed."""
    built = await build(
        parse_scenario(SCENARIO, "no-room"), vm_dir / "images", Tools.of(qemu_binary)
    )
    vm = await start_qemu(built)
    async with small_file_system(vm_dir / "states", MIB) as states:
        fill_up(states)
        assert is_full(states)
        monkeypatch.setenv("QMPBLOCK_STATE", str(states))
        async with qmpblock.connect(vm.monitor_path) as controller:
            disk = await controller.disk("vd0")
            await disk.allocate(0, 4 * MIB)
            overlay = vm_dir / "images" / "over.qcow2"
            with pytest.raises(NoRoomError):
                await disk.snapshot(overlay)
            async with disk.stream(speed=0) as job:
                pass
            assert job.outcome.changed
    await vm.quit()
    invariant.forget(vm)


@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
async def test_what_the_file_system_could_never_hold(
    fmt, start_qemu, vm_dir, qemu_binary, invariant
):
    """It is refused at once, instead of taking all that there is from everybody."""
    async with small_file_system(vm_dir / "small", 128 * MIB) as small:
        scenario = parse_scenario(
            f"about: A large disk.\nimages: [{{size: 1G, format: {fmt}}}]", "large"
        )
        built = await build(scenario, small / "images", Tools.of(qemu_binary))
        vm = await start_qemu(built)
        file = built.disks[0].active.path.resolve()
        before = file.stat().st_blocks
        code, _, err = await cli("allocate", vm.monitor_path, "vd0", "--full")
        assert (code, f"is of {128 * MIB} bytes in all" in err) == (2, True), err
        async with qmpblock.connect(vm.monitor_path) as controller:
            disk = await controller.disk("vd0")
            if fmt == "qcow2":
                with pytest.raises(RequestError, match="in all"):
                    await disk.make_room(1 << 30)
        assert file.stat().st_blocks == before
        await nothing_of_ours(vm)
        code, _, err = await cli("allocate", vm.monitor_path, "vd0", "--full", "--length", "1M")
        assert code == (4 if fmt == "raw" else 0), err  # tmpfs does not tell what it reserved
        await vm.quit()
    invariant.forget(vm)
