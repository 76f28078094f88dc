"""A running QEMU with a finely fragmented qcow2 disk, for the measurements."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

from qmpblock.testing.images import BuiltDisk, BuiltImage, Tools
from qmpblock.testing.qemu import QemuProcess
from qmpblock.testing.scenario import parse_scenario

CLUSTER = 4096
XFS_LEAST = 512 << 20  # bytes; mkfs.xfs makes no smaller one than 300 MiB


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
async def running(path: Path, size: int, fmt: str = "qcow2") -> AsyncIterator[QemuProcess]:
    """Run a tiny guest on the image, as a virtio-blk disk."""
    image = f"{{file: {path.name}, format: {fmt}, size: {size}}}"
    text = f"about: A disk to be measured.\nimages:\n  - {image}\n"
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


@contextmanager
def xfs(folder: Path, size: int) -> Iterator[Path | None]:
    """Have an XFS of so many bytes, on which files can share blocks; None where it cannot be."""
    image, place = folder / "xfs.img", folder / "xfs"
    make = ["mkfs.xfs", "-q", "-m", "reflink=1", str(image)]
    with image.open("wb") as file:
        file.truncate(size)
    try:
        if os.geteuid() or shutil.which(make[0]) is None:
            yield None
            return
        subprocess.run(make, check=True)
        place.mkdir()
        subprocess.run(["mount", "-o", "loop", str(image), str(place)], check=True)
        try:
            yield place
        finally:
            subprocess.run(["umount", str(place)], check=True)
    finally:
        image.unlink()
