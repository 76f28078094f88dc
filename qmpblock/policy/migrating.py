"""Does the migrations of a list: so many at once, each for itself; what is done is left alone."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from qmpblock.cancellation import task_group
from qmpblock.changes.identity import identify
from qmpblock.changes.survey import is_same_process
from qmpblock.errors import ConnectError, Error
from qmpblock.migration.arbiter import went_to
from qmpblock.migration.migrate import migrate
from qmpblock.names import MIGRATION_LOCK, handover_name, run_of
from qmpblock.policy.run import Connect, as_error, connect_to
from qmpblock.qemu import lock
from qmpblock.qemu.runstate import STANDS

if TYPE_CHECKING:
    from qmpblock.migration.job import MigrationResult
    from qmpblock.policy.migrations import ListedMigration, MigrationList
    from qmpblock.qemu.job import Progress
    from qmpblock.vm import VM

__all__ = ["ListedResult", "migrate_all"]


@dataclass(frozen=True)
class ListedResult:
    """What became of one migration of a list.

    :ivar state: `done`; `there`: the guest had gone over before, as its source says; `presumed`:
        the source cannot be reached any more, and a guest that came by a migration runs at the
        destination, this one or another; `failed`: see `error`, which says where the guest is.
    :ivar seconds: that it took.
    """

    migration: ListedMigration
    state: Literal["done", "there", "presumed", "failed"]
    seconds: float = 0.0
    result: MigrationResult | None = None
    error: Error | None = None


async def migrate_all(
    wanted: MigrationList,
    *,
    connect: Connect | None = None,
    progress: Callable[[ListedMigration, Progress], None] | None = None,
    ended: Callable[[ListedResult], None] | None = None,
) -> tuple[ListedResult, ...]:
    """Migrate what a list says; return what became of each, in its order.

    One that fails does not keep the others from going. One whose guest has gone over before, as
    both sides tell, is left alone: so a list can be run again. So is one of which only the
    destination can be asked, and has taken a guest. Cancelled, the guests of those under
    way go on at their sources, and no other begins; what has gone over stays there.

    :param connect: makes a VM of an address; by default `qmpblock.connect`.
    :param progress: is called with how far one is.
    :param ended: is called when one has ended.
    """
    turns = asyncio.Semaphore(wanted.parallel)
    results: dict[ListedMigration, ListedResult] = {}

    async def one(migration: ListedMigration) -> None:
        async with turns:
            result = await _tried(migration, connect or connect_to, progress)
        results[migration] = result
        if ended is not None:
            ended(result)

    async with task_group() as group:
        for migration in wanted.migrations:
            group.create_task(one(migration))
    return tuple(results[migration] for migration in wanted.migrations)


async def _tried(
    wanted: ListedMigration,
    connect: Connect,
    progress: Callable[[ListedMigration, Progress], None] | None,
) -> ListedResult:
    began = time.monotonic()
    try:
        async with AsyncExitStack() as stack:
            destination = await stack.enter_async_context(connect(wanted.destination))
            try:
                source = await stack.enter_async_context(connect(wanted.source))
            except ConnectError:
                if await _runs_what_came(destination):  # whose guest it is nothing tells any more
                    return ListedResult(wanted, "presumed")
                raise
            if await _gone_over(source, destination):
                return ListedResult(wanted, "there")
            async with migrate(
                source,
                destination,
                memory_only=wanted.memory_only,
                speed=wanted.speed,
                quit_source=wanted.quit_source,
                storage_daemon=wanted.storage_daemon,
                means=wanted.means,
                over=wanted.over,
                layers=wanted.layers,
                same_backing=wanted.same_backing,
                allocation=wanted.allocation,
            ) as job:
                async for seen in job:
                    if progress is not None:
                        progress(wanted, seen)
    except (Error, OSError) as error:
        return ListedResult(wanted, "failed", time.monotonic() - began, error=as_error(error))
    return ListedResult(wanted, "done", time.monotonic() - began, job.result)


async def _gone_over(source: VM, destination: VM) -> bool:
    """Whether the source has sent its guest there, by its arbiter, and the destination has it.

    It may stand there, as it did on the way: once nothing is left there to be finished.
    """
    status = (await source.monitor.execute("query-status"))["status"]
    if status != "postmigrate":
        return False
    objects = await source.monitor.execute("qom-list", {"path": "/objects"})
    names = [str(one["name"]) for one in objects]
    runs = [run_of(name) for name in names if name == handover_name(run_of(name))]
    [place, *others] = [await went_to(source.monitor, run) for run in runs] or [None]
    if place is None or others or not is_same_process(place, await identify(destination)):
        return False
    stands = await _what_came_is(destination, STANDS | {"suspended"})
    if stands and MIGRATION_LOCK not in await lock.names(destination.monitor):
        return True
    return await _runs_what_came(destination)


async def _runs_what_came(destination: VM) -> bool:
    """Whether a guest runs there that came by a migration."""
    return await _what_came_is(destination, {"running"})


async def _what_came_is(destination: VM, wanted: AbstractSet[str]) -> bool:
    migration = await destination.monitor.execute("query-migrate")
    status = await destination.monitor.execute("query-status")
    return status["status"] in wanted and migration.get("status") == "completed"
