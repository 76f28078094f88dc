"""The ways to migrate a VM that are measured against each other.

The bare ones are what a careful person writes by hand: the same safe order, and QEMU's commands and
events alone, over its own sockets, with no lock, journal, comparison or way back.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import qmpblock
from qmpblock.migration.stream import told_at
from qmpblock.qemu.monitor import Event, Subscription
from qmpblock.testing.destination import counterpart
from qmpblock.testing.images import BuiltDisk, Tools, build
from qmpblock.testing.qemu import QemuProcess
from qmpblock.testing.scenario import parse_scenario
from qmpblock.testing.stamps import StressSpec

MIB = 1 << 20
OURS, BARE = "migrate", "bare QMP"
OUR_MEMORY, BARE_MEMORY = "migrate --memory-only", "bare QMP, memory alone"

_RATE = 100  # the guest's writes a second, to each disk
_PATIENCE = 120  # seconds for an event


class Taken(NamedTuple):
    """What one migration took.

    :ivar seconds: until nothing was left to do; `phases`: of it.
    :ivar downtime: seconds for which the guest stood, by what both QEMUs say of when it did.
    :ivar stood: of it, until the source showed each of these states, and until it went on.
    """

    seconds: float
    phases: dict[str, float]
    downtime: float
    stood: dict[str, float]


class Pair:
    """A VM whose guest writes, and one that waits for it."""

    def __init__(self, source: QemuProcess, destination: QemuProcess) -> None:
        self.source = source
        self.destination = destination

    async def taken(self, way: Callable[[], Awaitable[dict[str, float]]]) -> Taken:
        """Migrate in one way, and say what it took."""
        with (
            self.source.control.subscribe("STOP", "MIGRATION") as here,
            self.destination.control.subscribe("RESUME") as there,
        ):
            begin = time.monotonic()
            phases = await way()
            seconds = time.monotonic() - begin
            stood = _stood([*here.pending(), await there.get(_PATIENCE)])
        guest = await self.destination.attach_guest()
        for number, _ in enumerate(self.destination.disks):
            done = await guest.stop_stress(number)
            assert (done.bad, done.errors) == (0, 0), done
        return Taken(seconds, phases, sum(stood.values()), stood)

    async def ours(self, *, memory_only: bool) -> dict[str, float]:
        """By the library, connected before as the others are."""
        async with (
            qmpblock.connect(self.source.monitor_path) as one,
            qmpblock.connect(self.destination.monitor_path) as other,
        ):
            begin = time.monotonic()
            async with qmpblock.migrate(one, other, memory_only=memory_only) as job:
                pass
            end = time.monotonic()
            assert job.result is not None
            spent = {one.phase: one.seconds for one in job.result.phases}
        return {"compared": end - begin - sum(spent.values()), **spent}

    async def bare(self, *, memory_only: bool) -> dict[str, float]:
        """By hand."""
        with self.source.control.subscribe(
            "BLOCK_JOB_READY", "JOB_STATUS_CHANGE", "MIGRATION"
        ) as events:
            return await _ByHand(self.source, self.destination, events).go(memory_only=memory_only)


class _ByHand:
    def __init__(self, source: QemuProcess, destination: QemuProcess, events: Subscription) -> None:
        self.here, self.there, self.events = source, destination, events
        self.names = [f"m{number}" for number, _ in enumerate(source.disks)]
        self.phases: dict[str, float] = {}
        self._began = time.monotonic()

    async def go(self, *, memory_only: bool) -> dict[str, float]:
        here, there, names = self.here, self.there, [] if memory_only else self.names
        nbd, stream = (str(there.directory / name) for name in ("nbd", "migration"))
        if names:
            unix = {"type": "unix", "data": {"path": nbd}}
            await there.execute("nbd-server-start", addr=unix)
            for name, node in zip(names, await _roots(there), strict=True):
                export = {"type": "nbd", "id": name, "node-name": node, "name": name}
                await there.execute("block-export-add", **export, writable=True)
        self._ends("checked")
        for name, node in zip(names, await _roots(here), strict=False):
            server = {"type": "unix", "path": nbd}
            await here.execute(
                "blockdev-add",
                **{"driver": "nbd", "node-name": name, "server": server, "export": name},
                discard="unmap",
            )
            await here.execute(
                "blockdev-mirror",
                **{"job-id": name, "device": node, "target": name, "sync": "full"},
                **{"copy-mode": "background", "granularity": 4096, "auto-dismiss": False},
            )
        await self._jobs("BLOCK_JOB_READY", "device", names)
        self._ends("mirroring")
        wanted = ["events", "return-path"] + ["pause-before-switchover"] * bool(names)
        states = [{"capability": name, "state": True} for name in wanted]
        await here.execute("migrate-set-capabilities", capabilities=states)
        self._ends("ready")
        await there.execute("migrate-incoming", uri=f"unix:{stream}")
        await here.execute("migrate", uri=f"unix:{stream}")
        if names:
            await self._migration("pre-switchover")
            self._ends("memory")
            for name in names:
                await here.execute("block-job-cancel", device=name)
            await self._jobs("JOB_STATUS_CHANGE", "id", names, status="concluded")
            self._ends("held")
            for name in names:
                await there.execute("block-export-del", id=name, mode="hard")
            self._ends("ended")
            await here.execute("migrate-continue", state="pre-switchover")
        await self._migration("completed")
        while (await here.execute("query-status"))["status"] != "postmigrate":
            pass
        while (await there.execute("query-status"))["status"] != "paused":
            pass
        self._ends("sent" if names else "memory")
        await there.execute("cont")
        self._ends("landed")
        for name in names:
            await here.execute("job-dismiss", id=name)
            await here.execute("blockdev-del", **{"node-name": name})
        if names:
            await there.execute("nbd-server-stop")
        self._ends("handed")
        return self.phases

    def _ends(self, phase: str) -> None:
        now = time.monotonic()
        self.phases[phase] = now - self._began
        self._began = now

    async def _jobs(self, event: str, key: str, names: list[str], **more: str) -> None:
        left = set(names)
        while left:
            said = await self.events.get(_PATIENCE)
            data = said["data"]
            if said["event"] == event and more.items() <= data.items():
                left.discard(data[key])

    async def _migration(self, status: str) -> None:
        while True:
            said = await self.events.get(_PATIENCE)
            if said["event"] == "MIGRATION":
                assert said["data"]["status"] not in ("failed", "cancelled"), said
                if said["data"]["status"] == status:
                    return


def _stood(events: Iterable[Event]) -> dict[str, float]:
    """Return how long each part took from STOP on, by the events' time stamps, in their order."""
    parts: dict[str, float] = {}
    last: float | None = None
    for event in events:
        now = told_at(event)
        assert now is not None
        if last is not None:
            parts[event.get("data", {}).get("status", event["event"])] = now - last
        if last is not None or event["event"] == "STOP":
            last = now
    return parts


async def _roots(vm: QemuProcess) -> list[str]:
    """Return the nodes that the guest's disks use."""
    listed: list[dict[str, Any]] = await vm.execute("query-block")
    return [one["inserted"]["node-name"] for one in listed if one.get("qdev")]


async def sources(folder: Path, number: int, mib: int, tools: Tools) -> list[BuiltDisk]:
    """Make so many disks of `mib` MiB of data each, in twice as much."""
    lines = [
        f"  - {{name: d{one}, images: [{{format: qcow2, size: {2 * mib}M, "
        f"content: [write 0 {mib}M 0xaa]}}], attach: {{id: v{one}}}}}\n"
        for one in range(number)
    ]
    scenario = parse_scenario("about: Disks.\ndisks:\n" + "".join(lines), "source")
    return list((await build(scenario, folder, tools)).disks)


@asynccontextmanager
async def pair(
    disks: list[BuiltDisk], folder: Path, tools: Tools, *, shared: bool
) -> AsyncIterator[Pair]:
    """Run a guest that writes to its disks all the time, and a destination for it.

    :param shared: the destination has the same images; else its own, which are gone after this.
    """
    place = folder / "destination"
    async with QemuProcess(disks, guest=True) as source:
        theirs = source.disks
        if not shared:
            theirs = (await build(counterpart(source), place, tools)).disks
        try:
            async with QemuProcess(theirs, guest=True, incoming="defer", extra=["-S"]) as waits:
                assert source.guest is not None
                for number, _ in enumerate(disks):
                    await source.guest.stress(_spec(number))
                yield Pair(source, waits)
        finally:
            shutil.rmtree(place, ignore_errors=True)
            subprocess.run(["sync"], check=True)  # nobody waits for what was written before


def _spec(number: int) -> StressSpec:
    return StressSpec(
        disk=number, blocks=1024, block_size=4096, queue_depth=4, seed=7 + number, rate=_RATE
    )
