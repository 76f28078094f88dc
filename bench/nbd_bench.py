"""Measure the NBD client beside nbdinfo and nbdcopy, on servers of this machine.

    python bench/nbd_bench.py

Prints one line a measurement: the time of ours, of the other, and the ratio. The map is of
a qcow2 image of 440,000 extents; reading is of 1 GiB from nbdkit's memory and 40,000
requests of 4 KiB.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from qmpblock.nbd import Client

CONTEXT = "qemu:allocation-depth"
CRUMBS = 220_000
GIB = 1 << 30


@contextmanager
def serving(socket: Path, *command: str) -> Iterator[str]:
    """Run a server until it listens, yield its address, end it."""
    process = subprocess.Popen(command)
    try:
        while not socket.exists():
            time.sleep(0.01)
            if process.poll() is not None:
                sys.exit(f"{command[0]} failed")
        yield f"unix:{socket}"
    finally:
        process.terminate()
        process.wait()


def make_crumbs(image: Path) -> None:
    """Make an image of CRUMBS zero clusters with a hole after each."""
    size = str(CRUMBS * 1024)
    create = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=512"]
    subprocess.run([*create, str(image), size], check=True)
    commands = "".join(f"write -q -z {i * 1024} 512\n" for i in range(CRUMBS))
    subprocess.run(
        ["qemu-io", "-t", "unsafe", "-f", "qcow2", str(image)],
        input=commands.encode(),
        stdout=subprocess.DEVNULL,
        check=True,
    )


async def timed(work: Callable[[], Awaitable[object]], rounds: int = 3) -> float:
    """Return the shortest of a few runs, in seconds."""
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        await work()
        times.append(time.perf_counter() - begin)
    return min(times)


async def run(*command: str) -> None:
    """Run a program to its end, its output thrown away."""
    process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.DEVNULL)
    if await process.wait():
        sys.exit(f"{command[0]} failed")


def report(what: str, ours: float, other: str = "", theirs: float = 0) -> None:
    """Print one line."""
    beside = f"   {other} {theirs:.3f} s ({theirs / ours:.1f} times ours)" if other else ""
    print(f"{what:44} {ours:.3f} s{beside}")


async def map_image(address: str) -> int:
    """Map the whole export; return the number of extents."""
    count = offset = 0
    async with await Client.connect(address, contexts=[CONTEXT]) as client:
        while offset < client.size:
            extents = (await client.block_status(offset, client.size - offset))[CONTEXT]
            count += len(extents)
            offset += int(extents[:, 0].sum())
    return count


async def read_all(address: str, size: int) -> None:
    """Read everything, 8 MiB at a time, 4 in flight."""
    step = 8 << 20
    async with await Client.connect(address, in_flight=4) as client:
        await asyncio.gather(*(client.read(at, step) for at in range(0, size, step)))


async def read_small(address: str, count: int) -> None:
    """Read 4 KiB so many times, 16 in flight."""
    async with await Client.connect(address) as client:
        places = iter(range(0, count * 4096, 4096))

        async def work() -> None:
            for at in places:
                await client.read(at, 4096)

        await asyncio.gather(*(work() for _ in range(16)))


async def main() -> None:
    """Measure everything."""
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        image, socket = folder / "crumbs", folder / "q"
        make_crumbs(image)
        qemu = ("qemu-nbd", "-t", "-e", "9", "-A", "-r", "-f", "qcow2", "-k", str(socket))
        with serving(socket, *qemu, str(image)) as address:
            uri = f"nbd+unix:///?socket={socket}"
            assert await map_image(address) == 2 * CRUMBS
            ours = await timed(lambda: map_image(address))
            theirs = await timed(lambda: run("nbdinfo", "--json", f"--map={CONTEXT}", uri))
            report(f"map of {2 * CRUMBS} extents", ours, "nbdinfo", theirs)
        socket = folder / "k"
        with serving(socket, "nbdkit", "-f", "-U", str(socket), "memory", "1G") as address:
            uri = f"nbd+unix:///?socket={socket}"
            async with await Client.connect(address) as client:
                for at in range(0, GIB, 64 << 20):
                    await client.write(at, b"\x5a" * (64 << 20))
            ours = await timed(lambda: read_all(address, GIB))
            copy = ("nbdcopy", "--connections=1", "--requests=4", uri, "null:")
            report("read of 1 GiB", ours, "nbdcopy", await timed(lambda: run(*copy)))
            report("40000 reads of 4 KiB", await timed(lambda: read_small(address, 40_000)))


asyncio.run(main())
