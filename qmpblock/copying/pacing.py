"""A copy that keeps to what the guest bears: it looks at that, and sets the speed of its jobs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qmpblock.cancellation import task_group
from qmpblock.copying.latency import Counted, Pacer

if TYPE_CHECKING:
    from qmpblock.copying.copytarget import CopyTarget
    from qmpblock.copying.job import CopyJob
    from qmpblock.graph.model import DiskDevice
    from qmpblock.qemu.connection import Connection

__all__ = ["counted", "paced"]

_LOOK = 0.25  # seconds between looks
_KINDS = {"read": "rd", "write": "wr"}
_NANO = 1e-9


async def paced(
    vm: Connection,
    job: CopyJob,
    targets: Sequence[CopyTarget],
    work: Callable[[], Coroutine[Any, Any, None]],
) -> None:
    """Have a copy work to its end, no faster than its `pacer` says, where it has one.

    Cancelling it cancels the work.

    :raise Error: the work's.
    """
    if job.pacer is None:
        await work()
        return
    devices = [target.plan.device for target in targets]
    async with task_group() as group:
        keeping = group.create_task(_keep(vm, job, job.pacer, devices))
        await group.create_task(work())
        keeping.cancel()


async def _keep(vm: Connection, job: CopyJob, pacer: Pacer, devices: Sequence[DiskDevice]) -> None:
    clock = asyncio.get_running_loop().time
    while True:
        seen = counted(await vm.monitor.execute("query-blockstats"), devices)
        done = sum(one.done for one in job.disks.values())
        pacer.look(clock(), seen, done, job.speed)
        await job.keep_to_speed()
        await asyncio.sleep(_LOOK)


def counted(
    stats: Sequence[Mapping[str, Any]], devices: Sequence[DiskDevice]
) -> dict[str, Counted]:
    """Return what QEMU has counted of the guest's requests to disks, by disk and kind. Pure.

    :param stats: query-blockstats' reply; what is no number there is not counted.
    """
    found: dict[str, Counted] = {}
    for device in devices:
        for one in stats:
            qdev, its = one.get("qdev"), one.get("stats")
            if qdev is None or device.qom_path not in (qdev, f"/machine/peripheral/{qdev}"):
                continue
            for kind, word in _KINDS.items():
                requests, took, slow = (
                    its.get(f"{word}_{what}") if isinstance(its, dict) else None
                    for what in ("operations", "total_time_ns", "latency_histogram")
                )
                if isinstance(requests, int) and isinstance(took, int):
                    edges, bins = _histogram(slow)
                    seen = Counted(requests, took * _NANO, edges, bins)
                    found[f"{kind} {device.qom_path}"] = seen
    return found


def _histogram(said: object) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """Return the edges and the bins of a latency histogram; none where it is not one."""
    edges, bins = (
        said.get(name) if isinstance(said, dict) else None for name in ("boundaries", "bins")
    )
    if not isinstance(edges, list) or not isinstance(bins, list) or len(bins) != len(edges) + 1:
        return (), ()
    if not all(isinstance(one, int) for one in (*edges, *bins)) or edges != sorted(set(edges)):
        return (), ()
    return tuple(edge * _NANO for edge in edges), tuple(bins)
