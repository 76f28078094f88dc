"""What the live tests of migrations share: the machines, a guest that writes, the verdict."""

import asyncio
import contextlib
import json
import signal
import socket
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from chains import convert
from disturbed import nothing_of_ours, writes_on

import qmpblock
from qmpblock.copying import relay as relay_module
from qmpblock.host.processes import command_line
from qmpblock.migration.passage import Passage
from qmpblock.migration.storage import Storage
from qmpblock.migration.stream import Stream
from qmpblock.testing import StressSpec, Tools, build, check_acknowledged, parse_scenario

MIB = 1 << 20
NEWER = Path("~/.cache/qmpblock/qemu/11.1.2/bin/qemu-system-x86_64").expanduser()
OLD_MACHINE = "pc-i440fx-7.2"
SPEED = 16 * MIB  # what a guest that is busy writes to its memory without end is more
ROOM = ["-m", "64"]
KEPT = "the disks' mirrors stay, paused, for another attempt"
ALIKE = ("-smp", "1,maxcpus=2,sockets=2,cores=1")  # of several cores 11.1 says more by CPUID
CONTROLLER = """\
import asyncio, json, os, signal, sys
import qmpblock
from qmpblock.migration.passage import Passage
from qmpblock.qemu.monitor import Monitor

source, destination, phase, options = sys.argv[1:]
options = json.loads(options)
options["means"] = qmpblock.MigrationMeans(**options.pop("means", {}))
stop, by = options.pop("stop", ""), options.pop("by", "")
enter = Passage.enter

async def die(self, now, **how):
    await enter(self, now, **how)
    if now.value == stop and by:
        await self.source.monitor.execute("human-monitor-command", {"command-line": by})
    elif now.value == stop:
        await self.source.monitor.execute("stop")
    if now.value == phase:
        os.kill(os.getpid(), signal.SIGKILL)

Passage.enter = die
execute = Monitor.execute

async def pause(self, command, *args):
    if phase == "marked" and command == "stop" and str(self.address).endswith(source):
        os.kill(os.getpid(), signal.SIGKILL)
    if phase == "finishing" and command == "quit" and str(self.address).endswith(source):
        await asyncio.sleep(0.5)  # the destination is cleared at the same time
        os.kill(os.getpid(), signal.SIGKILL)
    said = await execute(self, command, *args)
    if phase == "paused" and command == "stop" and str(self.address).endswith(source):
        os.kill(os.getpid(), signal.SIGKILL)
    return said

Monitor.execute = pause

async def main():
    async with qmpblock.connect(source) as one, qmpblock.connect(destination) as other:
        async with qmpblock.migrate(one, other, **options) as job:
            async for _ in job:
                pass

asyncio.run(main())
"""
DISK = "{{name: {name}, images: [{{size: 64M, format: {format}, content: [write 0 8M 0xaa]}}]"
ATTACH = ", attach: {{device: {device}, id: v{name}, iothread: {iothread}}}}}"


def machine(number=1, *, device="virtio-blk", iothread="none", image="qcow2"):
    """Return a scenario of so many disks."""
    lines = [
        (DISK + ATTACH).format(name=f"d{n}", format=image, device=device, iothread=iothread)
        for n in range(number)
    ]
    return "about: Disks.\ndisks:\n" + "".join(f"  - {line}\n" for line in lines)


def spec(number, *, rate=300):
    return StressSpec(
        disk=number,
        offset=16 * MIB,
        blocks=1024,
        block_size=4096,
        queue_depth=4,
        seed=70 + number,
        flush_every=20,
        rate=rate,
    )


def to_newer():
    """Return the options of a source and of a destination of a newer QEMU, for what takes both."""
    if not NEWER.exists():
        pytest.skip("tools/fetch_qemu.py has not fetched QEMU 11.1.2")
    here = {"machine": OLD_MACHINE, "extra": ALIKE}
    return {"here": here, "there": {"qemu": str(NEWER), "extra": ALIKE}}


@pytest.fixture
def begin(start_qemu, vm_dir, qemu_binary):
    """Give what starts a source whose guest writes to all of its disks."""

    async def start(text=None, *, rate=300, **options):
        built = await build(
            parse_scenario(text or machine(), "source"), vm_dir / "source", Tools.of(qemu_binary)
        )
        return await stressed(await start_qemu(built, guest=True, **options), rate)

    return start


@contextlib.asynccontextmanager
async def both(source, destination, **options):
    async with (
        qmpblock.connect(source.monitor_path, **options) as one,
        qmpblock.connect(destination.monitor_path, **options) as other,
    ):
        yield one, other


async def migrated(source, destination, stall=60, **options):
    async with (
        both(source, destination, stall=stall) as vms,
        qmpblock.migrate(*vms, **options) as job,
    ):
        async for _ in job:
            pass
    return job.result


async def overlying(
    start_qemu, source, directory, tools, *, backing=None, content="", named=True, **options
):
    """Start a destination whose images lie on the source's own backing images.

    :param backing: on which they lie instead; `named`: whether their headers say so.
    :param content: a command of qemu-io that writes to each of them.
    """
    made = []
    directory.mkdir(exist_ok=True)
    for disk in source.disks:
        below = backing or disk.active.backing
        path = directory / f"{disk.spec.name}-over"
        form = ["-b", str(below.path), "-F", below.spec.format] if named else []
        size = str(disk.active.spec.size)
        await tools.run(tools.img, "create", "-q", "-f", "qcow2", *form, str(path), size)
        if content:
            await tools.run(tools.io, "-f", "qcow2", "-c", content, str(path))
        image = replace(disk.active.spec, file=path.name, content=())
        over = replace(disk.active, spec=image, path=path, backing=below)
        attach = replace(disk.spec.attach, discard="unmap")
        made.append(replace(disk, spec=replace(disk.spec, attach=attach), active=over))
    options = {"machine": source.machine, "incoming": "defer", **options}
    return await start_qemu(tuple(made), extra=["-S"], **options)


async def migrated_to(host, source, destination, *, stall=60.0, **options):
    """As `migrated`, to another host (hosts.py), by ssh."""
    async with (
        qmpblock.connect(source.monitor_path, stall=stall) as one,
        qmpblock.connect(host.address(destination), stall=stall) as other,
        qmpblock.migrate(one, other, **options) as job,
    ):
        async for _ in job:
            pass
    return job.result


async def arrived(source, destination, result):
    """See that the guest goes on there, and finds all that it wrote; return how much that was."""
    print(
        f"{result.seconds:.3f} s, downtime {result.downtime * 1e3:.1f} ms: "
        + ", ".join(f"{one.phase} {one.seconds * 1e3:.0f}" for one in result.phases)
    )
    assert result.warnings == (), result.warnings
    guest = await destination.attach_guest()
    await nothing_of_ours(destination)
    numbers = range(len(destination.disks))
    for number in numbers:
        await writes_on(guest, number)
    ends = []
    for number in numbers:
        end = await guest.stop_stress(number)
        assert (end.bad, end.errors) == (0, 0), end
        assert await guest.check(number) > 0
        ends.append(end)
    if source.running:
        assert (await source.execute("query-status"))["status"] == "postmigrate"
        assert await source.execute("query-jobs") == []
        objects = {one["name"] for one in await source.execute("qom-list", path="/objects")}
        [left] = [name for name in objects if "qmpblock" in name]
        assert left.endswith("-handover")
        await source.quit()
    await destination.quit()
    tools = Tools.of(destination.command[0])
    for number, disk in enumerate(destination.disks):
        its = spec(number)
        raw = disk.active.path.parent / "content"
        await convert(tools, disk.active, disk.active.describe(), raw)
        data = raw.read_bytes()
        raw.unlink()
        assert data[: 8 * MIB] == b"\xaa" * (8 * MIB)
        area = data[its.offset : its.offset + its.length]
        assert check_acknowledged(area, its, ends[number].acked, ends[number].issued).ok
        await disk.active.check(tools)
    return ends


async def stressed(vm, rate=300):
    """Have the guest write to all of its disks."""
    for number, _ in enumerate(vm.disks):
        await vm.guest.stress(spec(number, rate=rate))
    return vm


@contextlib.asynccontextmanager
async def busy(vm):
    """Have the guest write to much of its memory, again and again; it needs `ROOM`."""

    async def write():
        while True:
            await vm.guest.dirty(32)

    task = asyncio.create_task(write())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@contextlib.contextmanager
def at(monkeypatch, phase, do):
    """Do something as soon as that phase has begun, once; `copying`: once the mirrors run."""
    with monkeypatch.context() as patch:
        before = Passage.enter
        todo = [do]

        async def enter(self, now, **how):
            await before(self, now, **how)
            if now.value == phase and todo:
                await todo.pop()()

        until_held = Stream.until_held

        async def until(self):
            if phase == "active":
                await todo.pop()()
            await until_held(self)

        until_ready = Storage.until_ready

        async def ready(self):
            if phase == "copying":
                await todo.pop()()
            await until_ready(self)

        patch.setattr(Storage, "until_ready", ready)
        patch.setattr(Passage, "enter", enter)
        patch.setattr(Stream, "until_held", until)
        yield
        assert not todo, f"the phase {phase} never came"


async def stays(source, invariant):
    """See that the guest runs at the source, unharmed, and that all there is as it was."""
    assert (await source.execute("query-status"))["status"] == "running"
    await writes_on(source.guest)
    now = await source.guest.progress()
    assert (now.bad, now.errors) == (0, 0)
    await nothing_of_ours(source)
    await invariant.verify(source)


async def snapshot(vm, directory):
    """Have somebody take a snapshot of the disk."""
    tools, below = Tools.of(vm.command[0]), vm.disks[0].active
    path = directory / "theirs.qcow2"
    form = ["-b", str(below.path), "-F", below.spec.format]
    await tools.run(tools.img, "create", "-q", "-f", "qcow2", *form, str(path))
    file = {"driver": "file", "filename": str(path)}
    node = {"driver": "qcow2", "node-name": "theirs", "file": file, "backing": None}
    await vm.execute("blockdev-add", **node)
    await vm.execute("blockdev-snapshot", node="d0", overlay="theirs")


def carried(monkeypatch):
    """Return what tells the bytes that went over the wires of the disks, once all is over."""
    before, sent = Storage.close, []

    async def close(self):
        sent.extend(wire.relay.sent for wire in self._laid)
        await before(self)

    monkeypatch.setattr(Storage, "close", close)
    return sent


def children_of(pid):
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def storage_daemons(directory):
    """Return the processes of those that serve images in that directory."""
    found = []
    for entry in Path("/proc").iterdir():
        words = command_line(int(entry.name)) if entry.name.isdigit() else ()
        if "--export" in words and any(str(directory) in word for word in words):
            found.append(int(entry.name))
    return found


@contextlib.asynccontextmanager
async def slow_wire(monkeypatch, rate, delay=0.0):
    """Have what the relay connects to be so far away, and carry so many bytes a second."""
    passing = set()

    async def carry(reader, writer, rate):
        now, free = asyncio.get_running_loop().time, 0.0
        with contextlib.suppress(OSError):
            while data := await reader.read(16 << 10):
                free = max(free, now() - 0.05) + len(data) / rate
                await asyncio.sleep(delay + max(0.0, free - now()))
                writer.write(data)
                await writer.drain()
        writer.close()

    async def pass_on(sock, server):
        here = await asyncio.open_unix_connection(sock=sock)
        there = await asyncio.open_unix_connection(server.path)
        try:
            await asyncio.gather(carry(here[0], there[1], rate), carry(there[0], here[1], 1 << 40))
        finally:
            for _, writer in (here, there):
                writer.transport.abort()

    async def open_socket(server):
        ours, theirs = socket.socketpair()
        passing.add(asyncio.create_task(pass_on(theirs, server)))
        ours.setblocking(False)
        return ours

    monkeypatch.setattr(relay_module, "open_socket", open_socket)
    yield
    for task in passing:
        task.cancel()
    await asyncio.gather(*passing, return_exceptions=True)


async def dies_in(phase, source, destination, *, address=None, **options):
    """Have a controller migrate, and be killed as soon as a phase has begun.

    `marked`: about to pause the guest; `paused`: it has. `finishing`: all that was its own is gone,
    and the source is about to be ended.

    `address`: of the destination, where that is not its monitor's path; `means`: fields of
    `MigrationMeans`; `stop`: a phase in which somebody else stops the guest; `by`: what its human
    monitor is told instead.
    """
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", CONTROLLER, source.monitor_path),
        *(address or destination.monitor_path, phase, json.dumps(options)),
    )
    assert await process.wait() == -signal.SIGKILL
