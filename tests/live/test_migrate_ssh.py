"""Migrations to another host by ssh: a network namespace, its own sshd, and a wire that is cut."""

import asyncio
import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import migrationoutcomes
import peers
import pytest
from chains import cli
from disturbed import locks, nothing_of_ours, until
from hosts import PORT
from migrating import arrived, at, children_of, dies_in, machine, migrated_to, stays
from test_docs import ROOT, blocks, console, same

import qmpblock
from qmpblock.copying import wire as wire_module
from qmpblock.errors import ConnectError, DisconnectedError, MonitorError, UndecidedError
from qmpblock.host.processes import command_line
from qmpblock.migration import outward
from qmpblock.migration.states import Phase
from qmpblock.migration.stream import told_at

pytestmark = pytest.mark.live

PAGE = ROOT / "docs/migration.md"

PHASES = ("mirroring", "ready", "memory", "active", "held", "ended", "sent", "landed")


@pytest.fixture
async def host(ssh_host):
    """Have destinations be started on one that `ssh` reaches."""
    return ssh_host


def no_socket_beside(vm):
    return [path.name for path in vm.directory.iterdir() if path.name.startswith("qmpblock")] == []


@pytest.mark.parametrize("device", ["virtio-blk", "virtio-scsi"])
async def test_two_disks_and_the_memory(device, host, begin, land):
    source = await begin(machine(2, device=device))
    destination = await land(source)
    result = await migrated_to(host, source, destination)
    assert no_socket_beside(destination)
    await arrived(source, destination, result)


async def test_the_command(host, begin, land):
    source = await begin()
    destination = await land(source)
    code, out, err = await cli(
        "migrate", source.monitor_path, host.address(destination), "--dry-run"
    )
    assert code in (0, 4), err
    code, out, err = await cli("migrate", source.monitor_path, host.address(destination))
    assert code == 0, err
    assert "the guest runs at the destination" in out
    assert (await destination.execute("query-status"))["running"]


def children():
    """Return the processes that this one started."""
    return children_of(os.getpid())


async def broken_off(host, phase, breaking, source, destination, monkeypatch):
    monkeypatch.setattr(outward, "STANDSTILL", 3.0)
    monkeypatch.setattr(wire_module, "HOLD", 2.0)
    with source.control.subscribe("STOP", "RESUME") as events:
        with at(monkeypatch, phase, breaking), pytest.raises(qmpblock.Error) as failed:
            await migrated_to(host, source, destination, stall=4)
        assert stood(events.pending()) < 30
    said = str(failed.value)
    print(said)
    assert "the guest runs at the source" in said
    if phase in PHASES[3:]:
        assert "see that it is ended, and never continue it" in said
    if phase == "landed":  # it may be there still, and has all of the guest
        [left] = await locks(source)
        assert left.endswith("-handover")
        await source.execute("object-del", id=left)
    if destination.running:
        with contextlib.suppress(DisconnectedError):  # it has just ended by itself
            assert not (await destination.execute("query-status"))["running"]


def stood(events):
    """Return the longest time that a guest stood, in seconds of its host's clock."""
    longest, since = 0.0, None
    for event in events:
        now = told_at(event)
        if event["event"] == "STOP":
            since = now
        elif since is not None:
            longest, since = max(longest, now - since), None
    assert since is None
    print(f"it stood for {longest:.2f} s")
    return longest


async def kill_ssh():
    [ssh] = [one for one in children() if "-L" in command_line(one)]
    os.kill(ssh, signal.SIGKILL)


@pytest.mark.parametrize("phase", PHASES)
async def test_ssh_is_killed(phase, host, begin, land, invariant, monkeypatch):
    source = await begin(machine(2))
    destination = await land(source)
    destination.expect_exit()
    await invariant.begin(source)
    await broken_off(host, phase, kill_ssh, source, destination, monkeypatch)
    await stays(source, invariant)
    await destination.kill()
    destination = await land(source)
    await arrived(source, destination, await migrated_to(host, source, destination))


async def test_ssh_is_killed_as_it_is_handed_over(host, begin, land, monkeypatch):
    """There is no way back, and the destination could not be told: who recovers it tells it."""
    source = await begin()
    destination = await land(source)
    source.expect_exit()
    with at(monkeypatch, "handed", kill_ssh), pytest.raises(DisconnectedError) as failed:
        await migrated_to(host, source, destination)
    print(failed.value)
    assert "never continue the source" in failed.value.standing
    assert "run: qmpblock recover" in failed.value.remedy
    assert (await source.execute("query-status"))["status"] == "postmigrate"
    assert (await destination.execute("query-status"))["status"] == "paused"
    *_, here, there = failed.value.remedy.split()
    recovered = await qmpblock.recover_migration(here, there)
    assert recovered.done is True
    await until(lambda: not source.running, "the end of the source")
    await nothing_of_ours(destination)
    guest = await destination.attach_guest()
    end = await guest.stop_stress(0)
    assert (end.bad, end.errors) == (0, 0), end
    assert await guest.check(0) > 0


@pytest.mark.parametrize("phase", PHASES)
async def test_the_wire_is_cut(phase, host, begin, land, invariant, monkeypatch):
    source = await begin(machine(2))
    destination = await land(source)
    destination.expect_exit()
    await invariant.begin(source)

    async def cutting():
        host.set_wire(up=False)

    await broken_off(host, phase, cutting, source, destination, monkeypatch)
    await stays(source, invariant)
    await destination.kill()
    host.set_wire(up=True)
    destination = await land(source)
    await arrived(source, destination, await migrated_to(host, source, destination))


@pytest.mark.parametrize("said", ["both", "source", "destination"])
async def test_the_controller_dies_and_is_recovered(said, host, begin, land, invariant):
    source = await begin(machine(2))
    destination = await land(source)
    destination.expect_exit()
    await invariant.begin(source)
    words = ("migrate", source.monitor_path, host.address(destination), "--speed", "1M")
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", "qmpblock", *words)
    await until(lambda: mirrors(source), "mirrors")
    [ssh] = children_of(process.pid)
    process.kill()
    await process.wait()
    await until(lambda: not Path(f"/proc/{ssh}/cmdline").exists(), "the end of ssh")
    sides = {"source": [source.monitor_path], "destination": [host.address(destination)]}
    given = sides.get(said, [*sides["destination"], *sides["source"]])
    code, out, err = await cli("recover", *given)
    print(out, err)
    assert code == 0, err
    await until(lambda: not destination.running, "the end of the destination")
    await stays(source, invariant)
    destination = await land(source)
    await arrived(source, destination, await migrated_to(host, source, destination))


async def test_a_destination_that_was_ended_keeps_no_arbiter_at_the_source(host, begin, land):
    """It had all of the guest; that its process has ended is not seen, but it has obeyed."""
    source = await begin()
    destination = await land(source)
    for vm in (source, destination):
        vm.expect_exit()
    sides = source.monitor_path, host.address(destination)
    await dies_in("landed", source, destination, address=sides[1])
    recovered = await qmpblock.recover_migration(*sides)
    assert recovered.done is False
    await nothing_of_ours(source)
    await until(lambda: not destination.running, "the end of the destination")
    assert (await source.execute("query-status"))["status"] == "running"


@pytest.mark.parametrize("phase", migrationoutcomes.PHASES, ids=lambda phase: phase.value)
async def test_the_controller_dies_and_the_wire_is_cut(phase, host, begin, land):
    """What the table in docs/migration.md says of it; and what comes of it with a wire again."""
    source = await begin()
    destination = await land(source)
    for vm in (source, destination):
        vm.expect_exit()
    sides = source.monitor_path, host.address(destination)
    await dies_in(phase.value, source, destination, address=sides[1])
    host.set_wire(up=False)
    wanted = migrationoutcomes.OUTCOMES[migrationoutcomes.WIRE][phase]
    if wanted == migrationoutcomes.ASKED:
        with pytest.raises(UndecidedError) as asked:
            await qmpblock.recover_migration(*sides, stall=5)
        print(asked.value)
        assert not (await source.execute("query-status"))["running"]
    else:
        recovered = await qmpblock.recover_migration(*sides, stall=5)
        assert recovered.done is False
        assert (await source.execute("query-status"))["running"]
    host.set_wire(up=True)
    with contextlib.suppress(MonitorError):  # it has ended by itself
        await qmpblock.recover_migration(*sides)
    vm, other = (destination, source) if phase is Phase.HANDED else (source, destination)
    await until(lambda: not other.running, "the end of the other one")
    if phase is Phase.LANDED:  # that it has ended cannot be seen from here
        [left] = await locks(source)
        assert left.endswith("-handover")
        await source.execute("object-del", id=left)
    await nothing_of_ours(vm)
    guest = vm.guest if vm is source else await vm.attach_guest()
    end = await guest.stop_stress(0)
    assert (end.bad, end.errors) == (0, 0), end
    assert await guest.check(0) > 0


async def mirrors(vm):
    return len(await vm.execute("query-jobs")) == 2


async def test_another_qemu_at_its_address_is_left_alone(host, begin, land, vm_dir, invariant):
    source = await begin()
    place = vm_dir / "place"
    place.mkdir(mode=0o700)
    destination = await land(source, directory=place)
    destination.expect_exit()
    await invariant.begin(source)
    words = ("migrate", source.monitor_path, host.address(destination), "--speed", "1M")
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", "qmpblock", *words)
    await until(lambda: source.execute("query-jobs"), "a mirror")
    process.kill()
    await process.wait()
    await destination.kill()
    shutil.rmtree(place)
    place.mkdir(mode=0o700)
    other = await land(source, directory=place)
    code, out, err = await cli("recover", source.monitor_path, host.address(other))
    print(out, err)
    assert code == 0, err
    assert (await other.execute("query-status"))["status"] == "inmigrate"
    await stays(source, invariant)


async def test_no_file_and_no_process_is_left(host, begin, land, vm_dir, monkeypatch):
    source = await begin()
    destination = await land(source)
    private = vm_dir / "tmp"
    private.mkdir(mode=0o700)
    monkeypatch.setenv("TMPDIR", str(private))
    monkeypatch.setattr(tempfile, "tempdir", None)
    async with qmpblock.connect(host.address(destination)) as vm:
        assert list(private.iterdir()) == []  # nor would a killed one leave any
        pid = vm.monitor.forward.pid
        assert pid in children()
        assert vm.monitor.peer_pid is None  # that is ssh's, not QEMU's
    assert pid not in children()
    code, _, err = await cli("disks", host.address(destination))
    assert code == 0, err


async def test_a_monitor_that_is_not_there(host, vm_dir):
    with pytest.raises(MonitorError) as failed:
        async with qmpblock.connect(f"ssh://root@{host.there}:{PORT}{vm_dir}/nothing"):
            pass
    print(failed.value)
    assert "ssh says: channel" in str(failed.value)


async def test_who_may_not_log_in(host, begin):
    (host.place / "user.pub").write_text("")
    with pytest.raises(ConnectError) as failed:
        async with qmpblock.connect(f"ssh://root@{host.there}:{PORT}/run/vm.qmp"):
            pass
    print(failed.value)
    assert "Permission denied" in str(failed.value)
    assert f"ssh -o BatchMode=yes -p {PORT} root@{host.there} true" in str(failed.value)


async def test_a_forward_of_somebody_elses_is_not_taken_for_qemu(
    host, begin, land, vm_dir, invariant
):
    source = await begin()
    destination = await land(source)
    passed_on = str(vm_dir / "forwarded")
    words = ("-N", "-p", str(PORT), "-L", f"{passed_on}:{destination.monitor_path}")
    ssh = subprocess.Popen(["ssh", *words, f"root@{host.there}"])
    try:
        await until(lambda: peers.listens(passed_on), "a forward")
        code, _, err = await cli("migrate", source.monitor_path, passed_on)
        print(err)
        assert code == 2
        assert "is passed on by process" in err
        assert "ssh://[USER@]HOST[:PORT]/PATH" in err
        code, _, err = await cli("migrate", host.address(destination), source.monitor_path)
        assert code == 2
        assert "run qmpblock on the source's host" in err
    finally:
        ssh.kill()
        ssh.wait()


async def test_the_worked_example(host, begin, land, monkeypatch):
    """The commands of docs/migration.md, as they stand there but for the paths."""
    source = await begin()
    destination = await land(source)
    consoles = [block for block in blocks(PAGE) if block.words[:1] == ("console",)]
    [walk] = [block for block in consoles if " ssh://other/" in block.body]
    config = (host.place / "ssh_config").read_text()
    named = f"Host other\n  HostName {host.there}\n  Port {PORT}\n  User root\nHost *\n"
    (host.place / "ssh_config").write_text(named + config)
    for command, output in console(walk.body):
        said = command.replace("/run/vm/vm.qmp", source.monitor_path)
        said = said.replace("/run/vm/new.qmp", destination.monitor_path)
        code, out, err = await cli(*shlex.split(said)[1:])
        assert code in (0, 4), err
        assert same(output, out), out
