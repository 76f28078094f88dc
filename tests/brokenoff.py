"""Migrations that are broken off: brought as far as a phase, by few commands, and left there.

By the moves in their order (`qmpblock.migration.states.ORDER`), and with what a controller leaves
for whoever recovers it: its locks, and its journal. Memory goes by a socket of QEMU's own, disks by
its NBD server; two VMs on one image stand for shared storage where there are no others.
"""

from contextlib import AsyncExitStack, suppress
from dataclasses import replace

from disturbed import until

import qmpblock
from qmpblock.errors import MonitorError
from qmpblock.migration import arbiter
from qmpblock.migration.hold import Hold, holder_of
from qmpblock.migration.record import Settings
from qmpblock.migration.states import Phase, Side
from qmpblock.names import MIGRATION_LOCK, copy_job, export_name, new_run, wire_node
from qmpblock.qemu import lock
from qmpblock.qemu.connection import Connection, NBDAccess
from qmpblock.testing import BuiltScenario, Tools, build
from qmpblock.testing.scenario import parse_scenario

PHASES = list(Phase)
NO_PROCESS = 1 << 22  # more than any has for its number
DISK = "about: A disk.\nimages:\n  - {{format: {}, size: 16M, content: [write 0 1M 0xaa]}}\n"


class Broken:
    """One migration between two QEMUs, by `go` as far as a phase."""

    def __init__(self, source, destination, directory, *, shared):
        self.source = source
        self.destination = destination
        self.run = new_run()
        self.shared = shared
        self._nbd = f"{directory}/nbd-{self.run}"
        self._stream = f"{directory}/mig-{self.run}"
        self.hold = None
        self._stack = AsyncExitStack()

    async def go(self, phase):
        """Do all that is done before a phase is left; return what both sides show."""
        moves = {
            Phase.CHECKED: self._check,
            Phase.MIRRORING: self._mirror,
            Phase.READY: self._await_ready,
            Phase.MEMORY: self._migrate,
            Phase.HELD: self._held,
            Phase.ENDED: self._end_mirrors,
            Phase.SENT: self._continue,
            Phase.LANDED: self._land,
            Phase.HANDED: self._claim,
        }
        for one in PHASES[: PHASES.index(phase) + 1]:
            await moves[one]()
        return await self.shown(self.source), await self.shown(self.destination)

    async def shown(self, vm):
        """Return what a side shows at one moment, which takes it more than one word to say."""
        while True:
            before = await vm.execute("query-migrate")
            status = (await vm.execute("query-status"))["status"]
            after = await vm.execute("query-migrate")
            if before.get("status") == after.get("status"):
                return status, after.get("status", "none")

    async def is_(self, vm, *wanted):
        return await self.shown(vm) in wanted

    async def is_not(self, vm, *passed):
        return not await self.is_(vm, *passed)

    async def _check(self):
        self.connections = [
            await self._stack.enter_async_context(Connection.open(vm.monitor_path, NBDAccess()))
            for vm in (self.source, self.destination)
        ]
        self.hold = await Hold.of(*self.connections, self.run, Settings())
        await self.hold.begin()
        await self.hold.write()

    async def _mirror(self):
        self.hold.enter(Phase.MIRRORING)
        if self.shared:
            return
        unix = {"type": "unix", "data": {"path": self._nbd}}
        await self.destination.execute("nbd-server-start", addr=unix)
        [device] = (await self.connections[1].graph()).disks()
        node, name = device.chain.active.node.name, export_name(self.run, 0)
        await self.destination.execute(
            "block-export-add", type="nbd", id=name, name=name, node_name=node, writable=True
        )
        await self.source.execute(
            "blockdev-add",
            driver="nbd",
            node_name=wire_node(self.run, 0),
            server={"type": "unix", "path": self._nbd},
            export=name,
        )
        [device] = (await self.connections[0].graph()).disks()
        await self.source.execute(
            "blockdev-mirror",
            job_id=copy_job(self.run, 0),
            device=device.chain.root.name,
            target=wire_node(self.run, 0),
            sync="full",
            copy_mode="background",
            granularity=4096,
            auto_dismiss=False,
        )

    async def _await_ready(self):
        if not self.shared:
            await until(self._is_ready, "a mirror that is ready")

    async def _is_ready(self):
        [job] = await self.source.execute("query-jobs")
        return job["status"] == "ready"

    async def _migrate(self):
        self.hold.enter(Phase.MEMORY)
        await self.source.execute(
            "migrate-set-capabilities",
            capabilities=[
                {"capability": name, "state": True}
                for name in ("return-path", "pause-before-switchover")
            ],
        )
        # Slow, so that the phase lasts.
        await self.source.execute("migrate-set-parameters", max_bandwidth=65536, downtime_limit=1)
        await self.destination.execute("migrate-incoming", uri=f"unix:{self._stream}")
        await self.source.execute("migrate", uri=f"unix:{self._stream}")
        await until(lambda: self.is_(self.source, ("running", "active")), "memory on its way")
        await until(lambda: self.is_(self.destination, ("inmigrate", "active")), "the other side")

    async def _held(self):
        fast = {"max_bandwidth": 1 << 30, "downtime_limit": 300}
        await self.source.execute("migrate-set-parameters", **fast)
        held = ("finish-migrate", "pre-switchover")
        await until(lambda: self.is_(self.source, held), "a guest that is held")

    async def _end_mirrors(self):
        if self.shared:
            return
        job = copy_job(self.run, 0)
        await self.source.execute("block-job-cancel", device=job)
        await until(self._has_concluded, "a mirror that has ended")
        name = export_name(self.run, 0)
        await self.destination.execute("block-export-del", id=name, mode="hard")

    async def _has_concluded(self):
        [job] = await self.source.execute("query-jobs")
        assert "error" not in job, job
        return job["status"] == "concluded"

    async def _continue(self):
        self.hold.enter(Phase.SENT)
        await self.source.execute("migrate-continue", state="pre-switchover")
        held = ("finish-migrate", "pre-switchover")  # for a moment more (11.1)
        await until(lambda: self.is_not(self.source, held), "a source that goes on")

    async def _land(self):
        away, there = ("postmigrate", "completed"), ("paused", "completed")
        await until(lambda: self.is_(self.source, away), "a source that has completed")
        await until(lambda: self.is_(self.destination, there), "a destination that has it all")

    async def _claim(self):
        said = await arbiter.claim(self.source.control, self.run, Side.DESTINATION)
        assert said is Side.DESTINATION
        self.hold.enter(Phase.HANDED)
        await arbiter.mark(self.destination.control, self.run)

    async def let_go(self):
        """Free the monitors, for others."""
        await self._stack.aclose()

    async def die(self):
        """Be a controller that died: its locks are those of a process that is gone."""
        for side, vm in ((Side.SOURCE, self.source), (Side.DESTINATION, self.destination)):
            me = holder_of(self.hold.record, self.run, side)
            dead = replace(me, pid=NO_PROCESS, start=1)
            with suppress(MonitorError):  # it has ended
                await lock.update(vm.control, MIGRATION_LOCK, dead)
        await self.let_go()

    async def recover(self, *sides, **options):
        """Recover by these sides' monitors; both, if none is given."""
        vms = sides or (self.source, self.destination)
        return await qmpblock.recover_migration(*(vm.monitor_path for vm in vms), **options)

    async def runs(self):
        """Return which sides' guests run."""
        running = []
        for side, vm in ((Side.SOURCE, self.source), (Side.DESTINATION, self.destination)):
            with suppress(MonitorError):  # it has ended
                if (await vm.execute("query-status"))["running"]:
                    running.append(side)
        return running


def starting(start_qemu, directory, qemu, invariant):
    """Return what starts a pair: `await start(shared=..., guest=...)`."""

    async def start(*, shared=True, guest=False, image="qcow2"):
        tools = Tools.of(qemu)
        scenario = parse_scenario(DISK.format(image), "migrating")
        built = await build(scenario, directory / "source", tools)
        other = built if shared else await build(scenario, directory / "destination", tools)
        assert isinstance(built, BuiltScenario)
        source = await start_qemu(built, guest=guest)
        destination = await start_qemu(other, guest=guest, incoming="defer", extra=["-S"])
        for vm in (source, destination):
            invariant.forget(vm)  # what a migration changes is no news
            vm.expect_exit()
        return Broken(source, destination, directory, shared=shared)

    return start
