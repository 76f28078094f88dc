"""A destination's command line is started by QEMU, pairs with its source, and takes it over."""

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
from dataclasses import replace
from pathlib import Path

import peers
import pytest
from chains import cli
from disturbed import until
from jsonschema import Draft202012Validator
from test_docs import ROOT, blocks, console, same

import qmpblock
from qmpblock.errors import UnsupportedError
from qmpblock.host.processes import die_with_parent
from qmpblock.migration.compare import compare, pairs
from qmpblock.migration.describe import describe
from qmpblock.migration.diskterms import DiskTerms
from qmpblock.migration.launch import launch
from qmpblock.migration.origin import read_origin
from qmpblock.migration.spawn import spawn
from qmpblock.qemu.connection import Connection, NBDAccess
from qmpblock.testing.images import Tools, build
from qmpblock.testing.scenario import parse_scenario

SCHEMAS = Path(__file__).parents[2] / "docs/schema"

pytestmark = pytest.mark.live

#: Machines of all sorts: what their disks hang on, in an iothread or not, below a filter or not.
MACHINES = [
    "two-disks-one-base.yaml",
    "iothread-virtio-blk.yaml",
    "iothread-virtio-scsi.yaml",
    "iothread-per-queue.yaml",
    "filter-throttle.yaml",
    "chain-3.yaml",
    "drive-virtio.yaml",
    "drive-ide.yaml",
    "no-id-virtio-scsi.yaml",
    "device-q35.yaml",
    "device-usb.yaml",
    "stress-iothread.yaml",
]


def document(name, text):
    """Return a document, which is as its schema says."""
    schema = json.loads((SCHEMAS / f"{name}.schema.json").read_text())
    found = json.loads(text)
    Draft202012Validator(schema).validate(found)
    return found


def connected(address):
    return Connection.open(address, NBDAccess())


@pytest.fixture
def folder(vm_dir):
    """Where images go."""
    images = vm_dir / "there"
    images.mkdir()
    return images


@pytest.fixture
def ending():
    """Return what has a destination end at the end, and its directory go."""
    pids, folders = set(), set()

    def end(pid, log=None):
        pids.add(pid)
        folders.update([] if log is None else [Path(log).parent])

    yield end
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for folder in folders:
        shutil.rmtree(folder)


async def taken_over(source, destination, directory):
    """Migrate the memory, and nothing else; the destination is paused then."""
    for monitor in (source.monitor, destination.monitor):
        await monitor.execute("query-status")
    uri = f"unix:{directory}/stream"
    await destination.monitor.execute("migrate-incoming", {"uri": uri})
    on = [{"capability": "return-path", "state": True}]
    await source.monitor.execute("migrate-set-capabilities", {"capabilities": on})
    await source.monitor.execute("migrate", {"uri": uri})

    async def over():
        status = (await source.monitor.execute("query-migrate")).get("status")
        assert status != "failed", await source.monitor.execute("query-migrate")
        return status == "completed"

    await until(over, "the end of the migration")

    async def landed():
        return (await destination.monitor.execute("query-status"))["status"] == "paused"

    await until(landed, "the destination, paused")


@pytest.mark.scenarios(*MACHINES)
async def test_it_is_the_same_machine_and_takes_it_over(
    scenario, start_qemu, invariant, vm_dir, folder, ending, qemu_binary
):
    vm = await start_qemu(await build(scenario, vm_dir / "images", Tools.of(qemu_binary)))
    invariant.forget(vm)
    async with connected(vm.monitor_path) as source:
        started = await spawn(source, str(folder))
        ending(started.pid, started.log)
        async with connected(started.monitor) as destination:
            here, there = await describe(source), await describe(destination)
            assert compare(here, there) == ()
            assert [one.size for one, _ in pairs(here, there)] == [
                disk.size for disk in here.disks if disk.size is not None
            ]
            assert there.paused is True
            await taken_over(source, destination, vm_dir)
            await destination.monitor.execute("quit")
    assert len(started.images) == len(vm.disks)
    assert all(os.stat(file).st_mode & 0o777 == 0o600 for file in started.images)


@pytest.mark.scenarios("chain-3.yaml", "two-disks-one-base.yaml")
async def test_of_a_chain_whose_active_layer_goes_the_image_lies_on_the_same(
    scenario, start_qemu, vm_dir, folder, ending, qemu_binary
):
    vm = await start_qemu(await build(scenario, vm_dir / "images", Tools.of(qemu_binary)))
    async with connected(vm.monitor_path) as source:
        started = await spawn(source, str(folder), layers="top")
        ending(started.pid, started.log)
        async with connected(started.monitor) as destination:
            here, there = await describe(source), await describe(destination)
            assert compare(here, there, DiskTerms(layers="top")) == ()
            assert all(one.below for one in there.disks)


@pytest.mark.parametrize("form", ["qcow2", "raw"])
async def test_images_have_host_space_for_every_byte(
    form, build_images, start_qemu, invariant, folder, ending
):
    """As a migration with --allocation full asks of them; it asks it of QEMU."""
    vm = await start_qemu(await build_images())
    invariant.forget(vm)
    vm.expect_exit()
    words = ("migrate", vm.monitor_path, "--spawn", "--directory", str(folder), "--json")
    code, out, err = await cli(*words, "--format", form, "--allocation", "full")
    assert code in (0, 4), err
    started = json.loads(out)
    ending(started["pid"], started["log"])
    [file] = started["images"]
    assert os.stat(file).st_blocks * 512 >= vm.disks[0].active.spec.size
    code, _, err = await cli(
        "migrate", vm.monitor_path, started["monitor"], "--allocation", "full", "--quit-source"
    )
    assert code == 0, err
    assert os.stat(file).st_blocks * 512 >= vm.disks[0].active.spec.size
    async with connected(started["monitor"]) as destination:
        await destination.monitor.execute("quit")


async def test_what_was_plugged_in_and_changed_later_is_there(
    build_images, start_qemu, invariant, vm_dir, folder, ending, qemu_binary
):
    """And where how it was started cannot be seen, the monitor alone suffices."""
    vm = await start_qemu(await build_images(), extra=["-smp", "2", "-cpu", "Nehalem"])
    invariant.forget(vm)
    tools = Tools.of(qemu_binary)
    await tools.run(tools.img, "create", "-q", "-f", "raw", str(vm_dir / "late"), "3M")
    file = {"driver": "file", "filename": str(vm_dir / "late")}
    await vm.execute("blockdev-add", driver="raw", node_name="late", file=file)
    await vm.execute("object-add", qom_type="iothread", id="io9", poll_max_ns=0)
    await vm.execute(
        "device_add", driver="virtio-blk-pci", id="late", drive="late", iothread="io9", addr="1d"
    )
    overlay = str(vm_dir / "over")
    await tools.run(tools.img, "create", "-q", "-f", "qcow2", overlay, "16M")
    node = {"driver": "qcow2", "file": {"driver": "file", "filename": overlay}, "backing": None}
    await vm.execute("blockdev-add", node_name="over", **node)
    await vm.execute("blockdev-snapshot", node=vm.disks[0].spec.name, overlay="over")
    async with connected(vm.monitor_path) as source:
        origin, here = await read_origin(source), await describe(source)
        started = await spawn(source, str(folder))
        ending(started.pid, started.log)
        async with connected(started.monitor) as destination:
            assert compare(here, await describe(destination)) == ()
            await destination.monitor.execute("quit")
        plan = launch(
            replace(origin, words=()), directory=str(folder), sockets=str(folder), qemu=qemu_binary
        )
        assert "-nodefaults" in plan.words
        blind = subprocess.Popen(plan.words, preexec_fn=die_with_parent())
        ending(blind.pid)
        await until(lambda: peers.listens(plan.monitor), "its monitor")
        async with connected(plan.monitor) as destination:
            assert compare(here, await describe(destination)) == ()
            await taken_over(source, destination, vm_dir)
            await destination.monitor.execute("quit")
        blind.wait()
    assert '"node-name": "over"' in "".join(plan.words)


@pytest.mark.scenarios("luks.yaml", "qcow2-luks.yaml")
async def test_a_key_is_never_shown(scenario, start_qemu, vm_dir, folder, qemu_binary):
    vm = await start_qemu(await build(scenario, vm_dir / "images", Tools.of(qemu_binary)))
    async with connected(vm.monitor_path) as source:
        with pytest.raises(UnsupportedError, match="keys are never shown") as caught:
            await spawn(source, str(folder))
    assert caught.value.standing == "nothing was touched"
    assert list(folder.iterdir()) == []
    code, out, err = await cli(
        "migrate", vm.monitor_path, "--command-line", "--directory", str(folder)
    )
    assert code == 4
    [key] = vm.secrets()
    assert key not in out + err
    assert '"key-secret": ' in out
    assert out.startswith(f"# {folder}/")
    assert "to be added: the key" in err


async def test_the_command(start_qemu, invariant, build_images, vm_dir, folder, ending):
    vm = await start_qemu(await build_images())
    arguments = ("migrate", vm.monitor_path, "--directory", str(folder))
    code, out, _ = await cli(*arguments, "--command-line", "--json")
    assert code == 0
    plan = document("migration-launch", out)
    assert plan["words"][-3:] == ["-S", "-incoming", "defer"]
    assert (plan["missing"], plan["notes"]) == ([], [])
    code, out, err = await cli(*arguments, "--spawn", "--json")
    assert code == 0, err
    started = document("migration-spawn", out)
    ending(started["pid"], started["log"])
    async with connected(vm.monitor_path) as source, connected(started["monitor"]) as destination:
        assert compare(await describe(source), await describe(destination)) == ()
        with pytest.raises(UnsupportedError, match="is there already"):
            await spawn(source, str(folder))


async def test_in_the_format_that_is_asked_for(start_qemu, invariant, build_images, folder, ending):
    vm = await start_qemu(await build_images())
    invariant.forget(vm)
    words = ("migrate", vm.monitor_path, "--directory", str(folder), "--format", "raw")
    code, out, err = await cli(*words, "--spawn", "--json")
    assert code == 0, err
    started = document("migration-spawn", out)
    ending(started["pid"], started["log"])
    code, _, err = await cli("migrate", vm.monitor_path, started["monitor"])
    assert code == 0, err
    async with qmpblock.connect(started["monitor"]) as destination:
        layers = [disk.device.chain.active for disk in await destination.disks()]
        assert {layer.format for layer in layers} == {"raw"}
        assert {layer.file for layer in layers} == set(started["images"])
        await destination.monitor.execute("quit")


@pytest.mark.scenarios("drive-ide.yaml", "no-id-virtio-scsi.yaml", "chain-3.yaml")
async def test_its_disks_come_along(
    scenario, start_qemu, invariant, vm_dir, folder, ending, qemu_binary
):
    """Into the image of the very disk, whatever the devices are called in QEMU's object tree."""
    built = await build(scenario, vm_dir / "images", Tools.of(qemu_binary))
    vm = await start_qemu(built)
    invariant.forget(vm)
    async with qmpblock.connect(vm.monitor_path) as source:
        started = await spawn(source, str(folder))
        ending(started.pid, started.log)
        async with qmpblock.connect(started.monitor) as destination:
            async with qmpblock.migrate(source, destination):
                pass
            assert (await destination.monitor.execute("query-status"))["status"] == "running"
            await destination.monitor.execute("quit")
    await until(lambda: not os.path.exists(started.monitor), "its end")
    await vm.quit()
    [image] = started.images
    verified = await qmpblock.verify_images(
        built.disks[0].active.path, image, format=built.disks[0].active.spec.format
    )
    assert verified.equal


async def test_disks_without_names_are_not_exchanged(
    start_qemu, build_images, invariant, vm_dir, qemu_binary
):
    """Of two that stand in another order on the destination's command line: by their addresses."""
    tools = Tools.of(qemu_binary)
    machines = {}
    for side, order in (("source", (4, 5)), ("destination", (5, 4))):
        words = []
        for addr in order:
            file = vm_dir / f"{side}-{addr}"
            await tools.run(tools.img, "create", "-q", "-f", "raw", str(file), "1M")
            if side == "source":
                file.write_bytes(bytes([addr]) * (1 << 20))
            inner = {"driver": "file", "filename": str(file), "discard": "unmap"}
            node = {"driver": "raw", "node-name": f"n{addr}", "discard": "unmap", "file": inner}
            words += ["-blockdev", json.dumps(node)]
            words += ["-device", f"virtio-blk-pci,drive=n{addr},addr={addr}"]
        more = {"incoming": "defer"} if side == "destination" else {}
        machines[side] = await start_qemu(
            extra=[*words, *(["-S"] if side == "destination" else [])], **more
        )
        invariant.forget(machines[side])
    async with (
        qmpblock.connect(machines["source"].monitor_path) as source,
        qmpblock.connect(machines["destination"].monitor_path) as destination,
        qmpblock.migrate(source, destination),
    ):
        pass
    for addr in (4, 5):
        assert set((vm_dir / f"destination-{addr}").read_bytes()) == {addr}


async def test_the_worked_example_on_one_host(
    start_qemu, invariant, vm_dir, folder, ending, qemu_binary
):
    """The commands of docs/migration.md, and what they print, as they stand there but for names."""
    page = ROOT / "docs/migration.md"
    section = page.read_text().partition("\n## On one host\n")[2].partition("\n## ")[0]
    walk = [one.body for one in blocks(page) if one.words[:1] == ("console",)]
    commands = list(console("".join(body for body in walk if body in section)))
    assert len(commands) == 5
    disk = "about: One.\nimages:\n  - {size: 1G, content: [write 0 64M 0xaa]}\n"
    built = await build(parse_scenario(disk, "source"), vm_dir / "images", Tools.of(qemu_binary))
    source = await start_qemu(built, extra=["-m", "64"])
    source.expect_exit()
    invariant.forget(source)
    meant = {"/run/vm/vm.qmp": source.monitor_path, "/images/new": str(folder)}
    spawned = "/tmp/qmpblock-vm-x7k2m9qd/qmp"
    for command, wanted in commands:
        for word, name in meant.items():
            command, wanted = command.replace(word, name), wanted.replace(word, name)
        code, out, err = await cli(*shlex.split(command)[1:])
        if "--spawn" in command:
            meant[spawned] = out.strip()
            wanted = wanted.replace(spawned, out.strip())
            async with connected(out.strip()) as destination:
                ending(destination.monitor.peer_pid, f"{Path(out.strip()).parent}/log")
        assert code == 0, err
        assert same(wanted, out), out
    async with connected(meant[spawned]) as destination:
        assert (await destination.monitor.execute("query-status"))["running"]
        await destination.monitor.execute("quit")
    tools = Tools.of(qemu_binary)
    await source.wait()
    await until(lambda: not os.path.exists(meant[spawned]), "its end")
    await tools.run(tools.img, "compare", str(built.disks[0].active.path), f"{folder}/vd0.qcow2")
