"""A running QEMU with a finely fragmented qcow2 disk, for the measurements."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from qmpblock.testing.images import BuiltDisk, BuiltImage, Tools
from qmpblock.testing.qemu import QemuProcess
from qmpblock.testing.scenario import parse_scenario

CLUSTER = 4096


def fragmented(path: Path, extents: int, tools: Tools) -> None:
    """Make a qcow2 in which data and holes alternate every cluster: `extents` of them."""
    create = [tools.img, "create", "-q", "-f", "qcow2", "-o", f"cluster_size={CLUSTER}"]
    subprocess.run([*create, str(path), str(extents * CLUSTER)], check=True)
    script = "".join(
        f"write -q -P 1 {offset} {CLUSTER}\n" for offset in range(0, extents * CLUSTER, 2 * CLUSTER)
    )
    subprocess.run(
        [tools.io, "-t", "unsafe", "-f", "qcow2", str(path)],
        input=script + "quit\n",
        text=True,
        check=True,
        stdout=subprocess.DEVNULL,
    )


@asynccontextmanager
async def running(path: Path, size: int) -> AsyncIterator[QemuProcess]:
    """Run a tiny guest on the image, as a virtio-blk disk."""
    text = f"about: A fragmented disk.\nimages:\n  - {{file: {path.name}, size: {size}}}\n"
    [disk] = parse_scenario(text, "bench").disks
    built = BuiltDisk(disk, BuiltImage(disk.images[0], path))
    async with QemuProcess([built], guest=True) as vm:
        yield vm


@asynccontextmanager
async def served(vm: QemuProcess, node: str) -> AsyncIterator[str]:
    """Export a node on an NBD server for the peers; yields the URI."""
    socket = str(vm.directory / "nbd")
    await vm.execute("nbd-server-start", addr={"type": "unix", "data": {"path": socket}})
    await vm.execute(
        "block-export-add",
        id="peer",
        type="nbd",
        name="peer",
        node_name=node,
        allocation_depth=True,
    )
    try:
        yield f"nbd+unix:///peer?socket={socket}"
    finally:
        await vm.execute("nbd-server-stop")


async def wall(*command: str, quiet: bool = False) -> float:
    """Run a command, its output to nowhere, and return the seconds it took.

    :param quiet: what it tells beside that is shown only where it fails.
    """
    loop = asyncio.get_running_loop()
    begin = loop.time()
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE if quiet else None,
    )
    _, told = await process.communicate()
    if process.returncode:
        said = f": {told.decode(errors='replace')}" if told else ""
        raise RuntimeError(f"{command} ended with exit code {process.returncode}{said}")
    return loop.time() - begin
