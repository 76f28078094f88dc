"""Migrations in which a storage daemon has the destination's images while they are mirrored."""

import os
import signal
from pathlib import Path

import pytest
from chains import cli
from disturbed import nothing_of_ours
from migrating import arrived, at, both, machine, migrated, stays, storage_daemons, to_newer
from otherusers import EVE

import qmpblock
from qmpblock.copying import wire as wire_module
from qmpblock.errors import ToolError, UnsupportedError
from qmpblock.host.processes import users_of
from qmpblock.migration import imageserver
from qmpblock.migration.rehearsal import plan_migration
from qmpblock.names import new_run
from qmpblock.qemu.capabilities import Capabilities
from qmpblock.testing import Tools, build, parse_scenario, read_area

pytestmark = pytest.mark.live
ENCRYPTED = {
    "luks": "{size: 64M, format: luks, secret: geheim, content: [write 16M 4M 0x00, FIRST]}",
    "overlay": "{size: 64M, content: [write 0 8M 0xbb]}, "
    "{options: {encrypt.format: luks}, secret: geheim, content: [FIRST]}",
}
PHASES = ("copying", "ready", "memory", "active", "held", "ended", "sent", "landed")


class BrokenOffError(Exception):
    """What a test raises in the middle."""


async def again(source, start_destination):
    destination = await start_destination(source)
    await arrived(source, destination, await migrated(source, destination, storage_daemon=True))


@pytest.fixture
def daemons(vm_dir):
    """Give what tells the storage daemons that have images of this test; at its end none does."""

    def find():
        return storage_daemons(vm_dir)

    yield find
    assert find() == []


@pytest.mark.parametrize("wanted", [False, True], ids=["unasked", "asked-for"])
async def test_a_dry_run_says_whether_there_would_be_one(
    wanted, begin, start_destination, daemons, qemu_version
):
    source = await begin(machine(iothread="one"))
    destination = await start_destination(source)
    async with both(source, destination) as vms:
        plan = await plan_migration(*vms, storage_daemon=wanted)
    dies = Capabilities(qemu_version).nbd_clients_endanger_iothreads  # of its own exports
    assert (plan.storage_daemon, plan.warnings) == (wanted or dies, ())
    await again(source, start_destination)


@pytest.mark.parametrize("image", ["qcow2", "raw"])
@pytest.mark.parametrize("iothread", ["none", "one"])
@pytest.mark.parametrize("device", ["virtio-blk", "virtio-scsi"])
async def test_every_kind_of_disk(device, iothread, image, begin, start_destination, daemons):
    source = await begin(machine(2, device=device, iothread=iothread, image=image))
    destination = await start_destination(source)
    result = await migrated(source, destination, storage_daemon=True)
    await arrived(source, destination, result)


@pytest.mark.parametrize("phase", PHASES)
async def test_the_daemon_dies(phase, begin, start_destination, invariant, monkeypatch, daemons):
    source = await begin(machine(2))
    destination = await start_destination(source)
    destination.expect_exit()
    await invariant.begin(source)
    died = []

    async def killing():
        died.extend(daemons())
        for pid in died:
            os.kill(pid, signal.SIGKILL)

    with at(monkeypatch, phase, killing):
        if phase in ("ended", "sent", "landed"):
            result = await migrated(source, destination, storage_daemon=True)
            assert len(died) == (phase == "ended")
            await arrived(source, destination, result)
            return
        with pytest.raises(qmpblock.Error) as failed:
            await migrated(source, destination, storage_daemon=True)
    print(failed.value)
    assert "the guest runs at the source" in str(failed.value)
    assert "the storage daemon has ended (exit code -9)" in str(failed.value)
    await stays(source, invariant)
    await again(source, start_destination)


@pytest.mark.parametrize("phase", PHASES)
async def test_the_daemon_falls_silent(
    phase, begin, start_destination, invariant, monkeypatch, daemons
):
    monkeypatch.setattr(wire_module, "HOLD", 2.0)
    source = await begin(machine(2))
    destination = await start_destination(source)
    destination.expect_exit()
    await invariant.begin(source)

    async def stopping():
        for pid in daemons():
            os.kill(pid, signal.SIGSTOP)

    with at(monkeypatch, phase, stopping):
        if phase in ("ended", "sent", "landed"):
            result = await migrated(source, destination, storage_daemon=True)
            await arrived(source, destination, result)
            return
        with pytest.raises(qmpblock.Error) as failed:
            async with (
                both(source, destination, stall=4) as vms,
                qmpblock.migrate(*vms, storage_daemon=True),
            ):
                pass
    print(failed.value)
    assert "the guest runs at the source" in str(failed.value)
    assert "the storage daemon did not end by itself, and was killed" in str(failed.value)
    await stays(source, invariant)
    await again(source, start_destination)


@pytest.mark.parametrize("device", ["virtio-blk", "virtio-scsi"])
@pytest.mark.parametrize("phase", PHASES)
async def test_the_destination_dies(phase, device, begin, start_destination, monkeypatch, daemons):
    """With an iothread: that of 7.2 does not die of its own export, for it has none."""
    source = await begin(machine(2, device=device, iothread="one"))
    destination = await start_destination(source)
    destination.expect_exit()

    async def killing():
        await destination.kill()

    with at(monkeypatch, phase, killing), pytest.raises(qmpblock.Error) as failed:
        await migrated(source, destination, storage_daemon=True)
    assert "the guest runs at the source" in str(failed.value)
    # Until they are ended the mirrors are kept; to other images they are of no use.
    assert ("mirrors stay, paused" in str(failed.value)) == (phase in PHASES[:5])
    await again(source, start_destination)


@pytest.mark.needs_qemu("< 8", reason="the machine type of 7.2 is what both know")
async def test_to_a_newer_qemu(begin, start_destination, daemons):
    options = to_newer()
    source = await begin(machine(2), **options["here"])
    destination = await start_destination(source, **options["there"])
    await arrived(source, destination, await migrated(source, destination, storage_daemon=True))


async def test_an_image_with_a_data_file(begin, start_qemu, vm_dir, qemu_binary, daemons):
    source = await begin()
    text = "about: A disk.\ndisks: [{name: d0, images: [{size: 64M, data_file: there.data}]}]\n"
    built = await build(parse_scenario(text, "there"), vm_dir / "there", Tools.of(qemu_binary))
    waiting = {"incoming": "defer", "extra": ["-S"]}
    destination = await start_qemu(built, guest=True, **waiting)
    await arrived(source, destination, await migrated(source, destination, storage_daemon=True))


@pytest.mark.parametrize("device", ["virtio-blk", "virtio-scsi"])
async def test_where_an_export_would_kill_it_there_is_one(
    device, begin, start_destination, invariant, monkeypatch, daemons
):
    """Broken off, such a destination lives, and can be migrated to."""
    source = await begin(machine(device=device, iothread="one"))
    destination = await start_destination(source)
    await invariant.begin(source)
    seen = []

    async def breaking():
        seen.append(len(daemons()))
        raise BrokenOffError

    with at(monkeypatch, "ready", breaking), pytest.raises(BrokenOffError):
        await migrated(source, destination)
    async with qmpblock.connect(source.monitor_path) as vm:
        old = Capabilities(vm.monitor.version).nbd_clients_endanger_iothreads
    assert seen == [int(old)]
    await stays(source, invariant)
    await nothing_of_ours(destination)
    await arrived(source, destination, await migrated(source, destination))


@pytest.mark.parametrize("kind", ENCRYPTED)
async def test_an_encrypted_image(
    kind, begin, start_destination, vm_dir, invariant, monkeypatch, daemons
):
    """With the destination's own key, of a file, which nobody sees on the way; or not at all."""
    images = ENCRYPTED[kind].replace("FIRST", "write 0 8M 0xaa")
    source = await begin(f"about: A disk.\ndisks: [{{name: d0, images: [{images}]}}]\n")
    destination = await start_destination(source)
    [(name, word)] = destination.disks[0].active.secrets().items()
    key = vm_dir / "key"
    key.write_text(word)
    await destination.execute("object-del", id=name)  # it is open by now
    await destination.execute("object-add", qom_type="secret", id=name, file=str(key))
    key.unlink()
    await invariant.begin(source)
    with pytest.raises(UnsupportedError, match=r"is encrypted: the file .* cannot be read here"):
        await migrated(source, destination, storage_daemon=True)
    await stays(source, invariant)
    await nothing_of_ours(destination)
    key.write_text(word)
    shown = []

    async def seeing():
        [pid] = daemons()
        shown.extend(Path(f"/proc/{pid}/{what}").read_bytes() for what in ("cmdline", "environ"))

    with at(monkeypatch, "ready", seeing):
        result = await migrated(source, destination, storage_daemon=True)
    assert b"secret,id=key0" in shown[0]
    assert word.encode() not in b"".join(shown)
    await arrived(source, destination, result)


async def test_what_a_daemon_cannot_have_is_refused(
    begin, start_qemu, vm_dir, qemu_binary, invariant, daemons
):
    source = await begin()
    text = "about: A disk.\ndisks: [{name: d0, images: [{size: 64M, format: qed}]}]\n"
    built = await build(parse_scenario(text, "there"), vm_dir / "there", Tools.of(qemu_binary))
    destination = await start_qemu(built, guest=True, incoming="defer", extra=["-S"])
    await invariant.begin(source)
    with pytest.raises(UnsupportedError, match="is no plain raw, qcow2 or luks image"):
        await migrated(source, destination, storage_daemon=True)
    await stays(source, invariant)
    await nothing_of_ours(destination)


async def test_one_that_is_not_here_is_named(begin, start_destination, monkeypatch, daemons):
    source = await begin()
    destination = await start_destination(source)
    monkeypatch.setattr(imageserver, "NAME", "qemu-storage-daemon-that-is-not-here")
    with pytest.raises(UnsupportedError, match="Debian: qemu-system-common"):
        await migrated(source, destination, storage_daemon=True)
    await nothing_of_ours(destination)


async def test_one_that_does_not_start_says_why(
    begin, start_destination, invariant, monkeypatch, daemons
):
    source = await begin()
    destination = await start_destination(source)
    await invariant.begin(source)

    async def removing():
        destination.disks[0].active.path.rename(
            destination.disks[0].active.path.with_name("elsewhere")
        )

    with at(monkeypatch, "mirroring", removing), pytest.raises(ToolError, match="No such file"):
        await migrated(source, destination, storage_daemon=True)
    await stays(source, invariant)
    await nothing_of_ours(destination)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can run as another user")
async def test_it_runs_as_the_destinations_user(eve):
    """And opens what that may, at a socket that only we can reach."""
    built = await eve.build(parse_scenario(machine(), "there"))
    vm = await eve.start(built, incoming="defer", extra=["-S"])
    async with qmpblock.connect(vm.monitor_path) as there:
        disks = (await there.graph()).disks()
        server = await imageserver.ImageServer.of(there, new_run(), disks)
        await server.start()
        try:
            [pid] = storage_daemons(built.disks[0].active.path.parent)
            assert users_of(pid) == (EVE,)
            [target] = server.targets
            assert await read_area(str(target), 0, 512) == b"\xaa" * 512
        finally:
            await server.end()
    assert storage_daemons(built.disks[0].active.path.parent) == []


async def test_the_command(begin, start_destination, daemons):
    source = await begin()
    destination = await start_destination(source)
    words = ("migrate", source.monitor_path, destination.monitor_path, "--storage-daemon")
    code, _, err = await cli(*words, "--memory-only")
    assert code == 2, err
    code, out, err = await cli(*words)
    assert code == 0, err
    assert "the guest runs at the destination" in out
