"""The VMs of this host: found as they were started, asked by the addresses that are told.

Real QEMUs, in every way to give a monitor. Those that others run on this host are left alone: what
is found is cut down to the test's own before anybody is asked.
"""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

import qmpblock
from qmpblock.cli.app import run
from qmpblock.errors import UnsupportedError
from qmpblock.host.processes import die_with_parent
from qmpblock.inventory import listing
from qmpblock.testing.images import Tools, build
from qmpblock.testing.scenario import parse_scenario

pytestmark = pytest.mark.live

SCHEMA = Path(__file__).parents[2] / "docs" / "schema" / "vms.schema.json"
RAW = "about: A raw disk.\nimages:\n  - {format: raw, size: 1M}\n"


@pytest.fixture
def ours(monkeypatch):
    """Return the list of the pids of the VMs that there are."""
    mine, every = [], listing.qemus
    monkeypatch.setattr(listing, "qemus", lambda: [one for one in every() if one.pid in mine])
    return mine


@pytest.fixture
def bare(vm_dir, qemu_binary, ours):
    """Return what starts a QEMU without a guest, in `vm_dir`; its monitors listen then."""
    started = []

    def start(*words, by=(), **options):
        alone = "-daemonize" in words  # it returns when it is ready; else its last monitor speaks
        process = subprocess.Popen(
            [*by, qemu_binary, "-M", "none", "-S", "-display", "none", "-nodefaults", *words]
            + ([] if alone else ["-qmp", "stdio"]),
            cwd=vm_dir,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            preexec_fn=die_with_parent(),
            **options,
        )
        started.append(process)
        if alone:
            assert process.wait() == 0
        else:
            assert process.stdout.readline().startswith(b'{"QMP"')
        ours.append(process.pid)
        return process.pid

    yield start
    for process in started:
        process.kill()
        process.communicate()


async def found(pid):
    [vm] = [one for one in await qmpblock.vms() if one.pid == pid]
    return vm


async def test_a_vm_of_ones_own(start_qemu, vm_dir, qemu_binary, ours, capsys):
    built = await build(parse_scenario(RAW, "x"), vm_dir / "images", Tools.of(qemu_binary))
    vm = await start_qemu(built, extra=["-name", "guest=web,debug-threads=on"])
    ours.append(vm.pid)
    held = qmpblock.connect(vm.monitor_path)  # and the harness holds another
    async with held:
        one = await found(vm.pid)
        assert one.address == f"unix:{vm.second_monitor_path}"
    assert await asyncio.to_thread(run, ["vms", "--json"]) == 0
    [said] = json.loads(capsys.readouterr().out)
    Draft202012Validator(json.loads(SCHEMA.read_text())).validate([said])
    assert (said["name"], said["pid"], said["manager"], said["refused"]) == (
        "web",
        vm.pid,
        None,
        {},
    )
    assert (said["trouble"], said["status"]) == ("", "running")
    [disk] = said["disks"]
    async with qmpblock.connect(said["address"]) as controller:
        there = await controller.disk(disk["device"])
        assert (there.size, there.chain.active.file) == (disk["size"], disk["file"])
    assert await asyncio.to_thread(run, ["vms"]) == 0
    assert f"disk     {disk['device']}  1M  raw" in capsys.readouterr().out


async def test_what_is_refused_there_is_what_is_refused(start_qemu, vm_dir, qemu_binary, ours):
    built = await build(parse_scenario(RAW, "x"), vm_dir / "images", Tools.of(qemu_binary))
    node = built.disks[0].active.describe(node="libvirt-1-format", live=True)
    vm = await start_qemu(
        [],
        extra=[
            *("-name", "web", "-blockdev", json.dumps(node)),
            *("-device", "virtio-blk-pci,drive=libvirt-1-format,id=virtio-disk0"),
        ],
    )
    ours.append(vm.pid)
    one = await found(vm.pid)
    assert one.manager.name == "libvirt"  # by its nodes, so by its own monitor
    assert one.address is not None
    async with qmpblock.connect(one.address) as controller:
        disk = await controller.disk("virtio-disk0")
        with pytest.raises(UnsupportedError) as caught:
            await disk.snapshot(vm_dir / "overlay.qcow2")
    assert caught.value.remedy.startswith(one.refused["snapshot"])


MONITORS = {
    "relative": ("-qmp unix:m,server=on,wait=off", "unix:{0}/m"),
    "daemonized": ("-qmp unix:m,server=on,wait=off -daemonize -pidfile {0}/pid", "unix:{0}/m"),
    "a device": ("-chardev socket,id=c,path={0}/m,server=on,wait=off {1}", "unix:{0}/m"),
    "abstract": ("-chardev socket,id=c,path={0}/m,abstract=on,server=on,wait=off {1}", None),
    "none": ("-monitor unix:m,server=on,wait=off", None),
}


@pytest.mark.parametrize("name", MONITORS)
async def test_every_way_to_give_a_monitor(name, bare, vm_dir, ours):
    words, address = MONITORS[name]
    words = words.format(vm_dir, "-mon c,mode=control").split()
    pid = bare(*words, env={**os.environ, "PWD": str(vm_dir)})
    if name == "daemonized":
        pid = int((vm_dir / "pid").read_text())
        ours.append(pid)
    try:
        one = await found(pid)
    finally:
        if name == "daemonized":
            os.kill(pid, signal.SIGKILL)
    if address is not None:
        assert (one.address, one.trouble) == (address.format(vm_dir), "")
        return
    assert one.address is None
    assert "QMP monitor" in one.trouble or "no path" in one.trouble
    assert "-qmp unix:" in one.remedy


async def test_by_tcp(bare, free_port):
    pid = bare("-qmp", f"tcp::{free_port},server=on,wait=off")
    assert (await found(pid)).address == f"tcp:127.0.0.1:{free_port}"


async def test_a_socket_that_it_was_given(bare, vm_dir):
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(vm_dir / "given"))
        listening.listen()
        fd = listening.fileno()
        pid = bare(
            *("-chardev", f"socket,id=c,fd={fd},server=on,wait=off", "-mon", "c,mode=control"),
            pass_fds=[fd],
        )
    one = await found(pid)
    assert (one.address, one.status) == (f"unix:{vm_dir}/given", "prelaunch")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for a mount namespace")
async def test_in_a_mount_namespace(bare, vm_dir):
    (vm_dir / "there").mkdir()
    enter = 'mount --make-rprivate / && mount -t tmpfs x there && exec "$@"'
    pid = bare(
        *("-qmp", f"unix:{vm_dir}/there/m,server=on,wait=off"),
        by=("unshare", "--mount", "sh", "-c", enter, "sh"),
    )
    one = await found(pid)
    assert one.address == f"unix:/proc/{pid}/root{vm_dir}/there/m"
    async with qmpblock.connect(one.address) as controller:
        assert controller.monitor.peer_pid == pid


async def test_anothers_socket_under_its_name_is_not_its_monitor(bare, vm_dir):
    """A process may be given any name: its neighbour is not asked in its place."""
    first = bare("-qmp", "unix:m,server=on,wait=off")
    (vm_dir / "m").rename(vm_dir / "first")
    second = bare("-qmp", "unix:m,server=on,wait=off")
    (vm_dir / "first").replace(vm_dir / "m")
    one = await found(second)
    assert (one.address, one.devices) == (None, None)
    assert f"is another process's ({first})" in one.trouble


async def test_who_hangs_or_is_held_is_said_and_keeps_no_other_from_being_told(bare, vm_dir):
    pids = {
        name: bare("-name", name, "-qmp", f"unix:{name},server=on,wait=off")
        for name in ("held", "hung", "well")
    }
    os.kill(pids["hung"], signal.SIGSTOP)
    with socket.socket(socket.AF_UNIX) as holder:
        holder.connect(str(vm_dir / "held"))
        assert holder.recv(4096).startswith(b'{"QMP"')
        found = {vm.name: vm for vm in await qmpblock.vms()}
    os.kill(pids["hung"], signal.SIGCONT)
    assert {name: vm.pid for name, vm in found.items()} == pids
    for name, vm in found.items():
        assert vm.address == f"unix:{vm_dir}/{name}"
    assert (found["well"].trouble, found["well"].status) == ("", "prelaunch")
    assert [found[name].status for name in ("held", "hung")] == [None, None]
    assert str(os.getpid()) in found["held"].trouble
    assert found["hung"].trouble


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for a mount namespace")
async def test_an_instance_of_incus(bare, vm_dir):
    """In its shape: Incus's own monitor is left to Incus, and the one beside it is told."""
    enter = (
        'mount --make-rprivate / && mount -t tmpfs x /run && mkdir -p /run/incus/a_web && exec "$@"'
    )
    config = vm_dir / "qemu.conf"
    config.write_text(
        '[chardev "monitor"]\nbackend = "socket"\npath = "/run/incus/a_web/qemu.monitor"\n'
        'server = "on"\nwait = "off"\n[mon]\nchardev = "monitor"\nmode = "control"\n'
    )
    pid = bare(
        *("-name", "web", "-readconfig", str(config)),
        *("-qmp", "unix:/run/incus/a_web/qmpblock.qmp,server=on,wait=off"),
        by=("unshare", "--mount", "sh", "-c", enter, "sh"),
    )
    one = await found(pid)
    assert (one.manager.name, one.manager.vm) == ("Incus", "a_web")
    assert one.refused["snapshot"] == "incus snapshot create --project a web"
    assert one.address == f"unix:/proc/{pid}/root/run/incus/a_web/qmpblock.qmp"
    inside = ("nsenter", "-m", "-t", str(pid), sys.executable, "-m", "qmpblock")
    done = subprocess.run([*inside, "disks", "incus:a_web"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "This VM has no disks.\n"), done.stderr
    done = subprocess.run([*inside, "disks", "incus:b"], capture_output=True, text=True)
    assert done.returncode == 3
    assert "incus config set b raw.qemu=" in done.stderr
