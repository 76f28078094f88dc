"""What a guest feels of a copy of its disk: the latency of its writes meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from bench.copying import MIB, Ways, opened, run_job
from qmpblock.testing.stamps import StressSpec

_RATE = 200  # the guest's writes a second
_SLOW = 4 * MIB  # bytes a second that a slow target takes
_SOME = 3.0  # seconds of the guest alone
# Upper bounds of the histogram's bins, ns: from 20 us to beyond a minute, each 7 % above the last.
_BOUNDS = [int(20_000 * 1.07**n) for n in range(225)]


@asynccontextmanager
async def felt(ways: Ways, into: dict[str, float]) -> AsyncIterator[None]:
    """Take the guest's latency while this lasts, into a mapping; milliseconds."""
    vm, guest = ways.vm, ways.vm.guest
    assert guest is not None
    device = ways.disk.device.qom_path
    before = await guest.progress()
    await guest.latency()  # counts anew from here
    await vm.execute("block-latency-histogram-set", **{"id": device, "boundaries-write": _BOUNDS})
    yield
    seen = await guest.latency()
    [stats] = [
        one["stats"]
        for one in await vm.execute("query-blockstats")
        if device in (one.get("qdev"), one.get("device"))
    ]
    bins = stats["wr_latency_histogram"]["bins"]
    after = await guest.progress()
    into |= {
        "writes": sum(bins),
        "median": _quantile(bins, 0.5),
        "p99": _quantile(bins, 0.99),
        "longest": _quantile(bins, 1.0),
        "guest_longest": seen.held_us / 1000,
        "errors": after.errors - before.errors,
    }


def _quantile(bins: list[int], share: float) -> float:
    """Return the upper bound, in ms, of the bin up to which this share of all lies."""
    wanted, found = share * sum(bins), 0
    for number, count in enumerate(bins):
        found += count
        if found >= wanted and found:
            return _BOUNDS[min(number, len(_BOUNDS) - 1)] / 1e6
    return 0.0


async def feelings(ways: Ways, seconds: float) -> dict[str, dict[str, float]]:
    """Return what the guest feels of each: idle, copies, and copies to what is slow.

    :param seconds: after which a copy to a slow target is given up.
    """
    guest = ways.vm.guest
    assert guest is not None
    blocks = 1 << ((ways.disk.size // 2 // 4096).bit_length() - 1)  # those with data
    await guest.stress(
        StressSpec(blocks=blocks, block_size=4096, queue_depth=4, seed=5, rate=_RATE)
    )
    said: dict[str, dict[str, float]] = {}

    async def take(name: str, what: Callable[[], Awaitable[None]]) -> None:
        await asyncio.sleep(0.5)
        said[name] = {}
        begin = time.monotonic()
        async with felt(ways, said[name]):
            await what()
        said[name]["seconds"] = time.monotonic() - begin

    fast: list[tuple[str, Callable[[], Awaitable[None]]]] = [
        ("copy --at start", lambda: ways.ours("start", "qcow2")),
        ("copy --at end", lambda: ways.ours("end", "qcow2")),
        ("blockdev-backup", lambda: ways.job("blockdev-backup", "qcow2")),
    ]
    slow: list[tuple[str, Callable[[str], Awaitable[None]]]] = [
        ("copy --at start, slow target", lambda uri: _ours(ways, "start", uri)),
        ("copy --at end, slow target", lambda uri: _ours(ways, "end", uri)),
        ("blockdev-backup, slow target", lambda uri: _backup(ways, uri)),
    ]
    await take("idle", lambda: asyncio.sleep(_SOME))
    for name, work in fast:
        await take(name, lambda work=work: work())  # type: ignore[misc]
        ways.target.unlink()
    for name, to in slow:
        with slow_server(ways.disk.size) as uri:
            await take(name, lambda to=to, uri=uri: _for(seconds, to(uri)))  # type: ignore[misc]
    done = await guest.stop_stress()
    assert (done.bad, done.errors) == (0, 0), done
    return said


async def _for(seconds: float, work: Awaitable[None]) -> None:
    """Give something up after so many seconds."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await work


async def _ours(ways: Ways, at: Any, uri: str) -> None:
    async with ways.disk.copy(uri, at=at):
        pass


async def _backup(ways: Ways, uri: str) -> None:
    """Do it by QEMU's job alone, to an NBD server."""
    path = uri.partition("socket=")[2]
    server = {"type": "unix", "path": path}
    async with opened(ways.vm, {"driver": "nbd", "server": server}, "raw") as node:
        await run_job(ways.vm, "blockdev-backup", ways.disk.chain.active.node.name, node)


@contextmanager
def slow_server(size: int) -> Iterator[str]:
    """Serve a file that takes only so many bytes a second; yield its URI."""
    with tempfile.TemporaryDirectory(prefix="qmpblock-slow-") as folder:
        image, socket = Path(folder) / "slow", Path(folder) / "nbd"
        with image.open("wb") as file:
            file.truncate(size)
        throttle = "driver=throttle,throttle-group=slow,file.driver=raw,file.file.driver=file,"
        server = subprocess.Popen(
            [
                *("qemu-nbd", "-t", "-e", "9", "-k", str(socket)),
                *("--object", f"throttle-group,id=slow,x-bps-write={_SLOW}"),
                *("--image-opts", f"{throttle}file.file.filename={image}"),
            ],
            stderr=subprocess.DEVNULL,  # it tells of each client that goes
        )
        try:
            while not socket.exists():
                time.sleep(0.01)
                assert server.poll() is None, "qemu-nbd failed"
            yield f"nbd+unix:///?socket={socket}"
        finally:
            server.terminate()
            server.wait()
