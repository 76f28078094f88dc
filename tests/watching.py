"""What the live tests of write-ahead room share: a watch in this process, and what to look at."""

import asyncio
import contextlib
import os
import re
from pathlib import Path

import qmpblock
from qmpblock.errors import UnsupportedError
from qmpblock.host.space import reserved_ranges
from qmpblock.testing.faults import _run as run_tool
from qmpblock.testing.images import Tools, build
from qmpblock.testing.scenario import parse_scenario

MIB = 1 << 20
_PATIENCE = 60.0  # seconds; the machine may be loaded


def alone(fmt="qcow2", size="256M", more=""):
    """Return a scenario of one empty image."""
    text = f"about: One empty image.\nimages:\n  - {{format: {fmt}, size: {size}}}\n{more}"
    return parse_scenario(text, f"alone-{fmt}")


async def built(scenario, directory, qemu):
    return await build(scenario, directory, Tools.of(qemu))


class Watching:
    """A watch that goes on; `told`, the commands that it has sent, and those QEMU has answered."""

    def __init__(self):
        self.told = []
        self.sent = []
        self.answered = []
        self.task = None
        self.disk = None
        self.cancel_at = None  # the command before which the watch is cancelled

    def thresholds(self):
        """Return each (node, offset) that was set; 0 takes one away."""
        return [
            (arguments["node-name"], arguments["write-threshold"])
            for command, arguments in self.answered
            if command == "block-set-write-threshold"
        ]

    async def until(self, condition, what):
        """Wait until a condition holds; the watch must not have ended before."""

        def holds():
            assert not self.task.done(), self.task
            return condition()

        await eventually(holds, what)

    async def fails(self, kind, words):
        """Wait until the watch has ended with an error; return that."""
        await asyncio.wait({self.task}, timeout=_PATIENCE)
        assert self.task.done(), f"it goes on, having sent {self.sent}"
        error = self.task.exception()
        assert isinstance(error, kind), error
        assert re.search(words, str(error)), error
        return error

    async def begun(self):
        """Wait until the first threshold is set; what a dead watcher left is taken away before."""
        await self.until(lambda: any(offset for _, offset in self.thresholds()), "set a threshold")


@contextlib.asynccontextmanager
async def watching(vm, size, *, disk="vd0", address=None, keep_free=0):
    """Keep the room of a disk while the body runs; at the end it is cancelled, if it goes on."""
    seen = Watching()
    async with qmpblock.connect(address or vm.monitor_path) as controller:
        seen.disk = await controller.disk(disk)
        real = controller.monitor._execute

        async def execute(command, arguments):
            seen.sent.append((command, dict(arguments or {})))
            if command == seen.cancel_at:
                seen.cancel_at = None
                seen.task.cancel()
            reply = await real(command, arguments)
            seen.answered.append((command, dict(arguments or {})))
            return reply

        controller.monitor._execute = execute
        seen.task = asyncio.ensure_future(
            seen.disk.keep_ahead(size, keep_free=keep_free, tell=seen.told.append)
        )
        try:
            yield seen
        finally:
            seen.task.cancel()
            await asyncio.wait({seen.task})


async def eventually(condition, what):
    """Wait until `condition` (which may be async) holds."""
    deadline = asyncio.get_running_loop().time() + _PATIENCE
    while True:
        value = condition()
        if asyncio.iscoroutine(value):
            value = await value
        if value:
            return value
        assert asyncio.get_running_loop().time() < deadline, f"it did not {what}"
        await asyncio.sleep(0.02)


async def armed(vm):
    """Return the write threshold of every node that has one."""
    nodes = await vm.execute("query-named-block-nodes", flat=True)
    return {n["node-name"]: n["write_threshold"] for n in nodes if n["write_threshold"]}


async def armed_node(vm):
    """Return the node that has a threshold; between an event and the next look none has."""
    async with asyncio.timeout(120):
        while not (found := await armed(vm)):
            await asyncio.sleep(0.05)
    [node] = found
    return node


async def locks(vm):
    """Return the locks of watchers."""
    objects = await vm.execute("qom-list", path="/objects")
    return sorted(o["name"] for o in objects if o["name"].startswith("qmpblock-ahead-"))


def past_the_end(path):
    """Return how many bytes are reserved past the end of a file."""
    found = reserved_ranges(str(path), 1 << 60, first=Path(path).stat().st_size)
    assert found is not None, "this file system has no FIEMAP"
    return found.total


def filled(directory):
    """Take all the space of a small file system; return the file that has it."""
    filler = directory / "filler"
    with filler.open("wb", buffering=0) as file:
        for piece in (MIB, 4096):
            with contextlib.suppress(OSError):
                while file.write(bytes(piece)) == piece:
                    os.fsync(file.fileno())  # or ext4 would only promise it
    left = os.statvfs(directory)
    assert left.f_bavail * left.f_frsize < 64 << 10
    return filler


@contextlib.asynccontextmanager
async def small_ext4(directory, size):
    """Mount an ext4 of `size` bytes, which unlike tmpfs tells what is reserved.

    :raise UnsupportedError: this user, or this machine, cannot; the message is fit for a skip.
    """
    if os.geteuid() != 0:
        raise UnsupportedError("only root may mount a file system")
    image = directory.with_name(f"{directory.name}.ext4")
    with image.open("wb") as file:
        file.truncate(size)
    directory.mkdir()
    try:
        # Without reserved blocks, and without tables that are written later.
        options = "lazy_itable_init=0,lazy_journal_init=0"
        await run_tool(["mkfs.ext4", "-q", "-F", "-m", "0", "-E", options, str(image)])
        await run_tool(["mount", "-o", "loop", str(image), str(directory)])
    except (qmpblock.Error, FileNotFoundError) as error:
        raise UnsupportedError(f"no file system can be mounted from a file: {error}") from None
    try:
        yield directory
    finally:
        await asyncio.shield(run_tool(["umount", "--lazy", str(directory)]))
        image.unlink()
