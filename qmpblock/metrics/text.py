"""Figures in Prometheus's text format; prometheus-client writes it.

All are gauges, of the moment in which they were seen. A figure that cannot be told is not there,
rather than wrong.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from qmpblock.errors import UNTOUCHED, RequestError, printable

if TYPE_CHECKING:
    from qmpblock.metrics.figures import DiskFigures, VMFigures

__all__ = [
    "METRICS",
    "Figure",
    "Metric",
    "figures_of",
    "job_figures",
    "rendered",
    "room_figures",
    "work_figure",
]

_PREFIX = "qmpblock_"


@dataclass(frozen=True)
class Metric:
    """What a figure is of.

    :ivar labels: what tells one from the other: `vm` is an address, `disk` a name there, `work` the
        id of a job, or what a command of ours does. (`job` is the scraper's word in Prometheus.)
    """

    help: str
    labels: tuple[str, ...]


_VM, _DISK, _JOB = ("vm",), ("vm", "disk"), ("vm", "work", "type")

METRICS: Mapping[str, Metric] = {
    "up": Metric("Whether the VM's monitor answered, in time.", _VM),
    "held": Metric("Whether another client holds the VM's monitor, so that it is not up.", _VM),
    "look_seconds": Metric("How long it took to look at the VM.", _VM),
    "recovery_needed": Metric("Whether a controller that died left something in the VM.", _VM),
    "disk_info": Metric(
        "1 for each disk; called: what the VM's manager calls it, or else its name.",
        (*_DISK, "called"),
    ),
    "disk_size_bytes": Metric("The size that the guest sees.", _DISK),
    "disk_layer_bytes": Metric(
        "What of the disk a layer supplies; depth 0 is the active one. Kind: data; zero, which "
        "it holds; reserved, those zeros that have host space.",
        (*_DISK, "depth", "kind"),
    ),
    "disk_backing_bytes": Metric("What layers below the active one still supply.", _DISK),
    "disk_mapped": Metric("Whether the disk's map could be taken.", _DISK),
    "map_seconds": Metric("How long the disk's map took.", _DISK),
    "room_bytes": Metric("Host space that is reserved ahead of the guest.", _DISK),
    "room_wanted_bytes": Metric("How much of it is wanted.", _DISK),
    "host_free_bytes": Metric("What is free where the disk's active image grows.", _DISK),
    "job_done_bytes": Metric("How far a job is.", _JOB),
    "job_total_bytes": Metric("How far it has to go; this may grow.", _JOB),
    "job_seconds_since_progress": Metric("For how long it has not moved while it should.", _JOB),
    "job_seconds": Metric("For how long it has been at work.", _JOB),
}


class Figure(NamedTuple):
    """One number."""

    metric: str
    labels: tuple[str, ...]
    value: float


def figures_of(vm: VMFigures) -> Iterator[Figure]:
    """Yield all that there is of a VM."""
    name = (vm.address,)
    yield Figure("up", name, vm.up)
    yield Figure("held", name, vm.held)
    yield Figure("look_seconds", name, vm.seconds)
    if vm.recovery_needed is not None:
        yield Figure("recovery_needed", name, vm.recovery_needed)
    for disk in vm.disks:
        yield from _disk_figures(vm.address, disk)
    for job in vm.jobs:
        yield from job_figures(vm.address, job.id, job.type, job.current, job.total)


def _disk_figures(address: str, disk: DiskFigures) -> Iterator[Figure]:
    name = (address, disk.disk)
    yield Figure("disk_info", (*name, disk.called or disk.disk), 1)
    yield Figure("disk_size_bytes", name, disk.size)
    for layer in disk.layers or ():
        for kind in ("data", "zero", "reserved"):
            labels = (*name, str(layer.depth), kind)
            yield Figure("disk_layer_bytes", labels, getattr(layer, kind))
    if disk.layers is not None or disk.error is not None:
        yield Figure("disk_mapped", name, disk.layers is not None)
    for metric, value in (
        ("disk_backing_bytes", disk.backing),
        ("map_seconds", disk.map_seconds),
        ("room_bytes", disk.room),
        ("host_free_bytes", disk.host_free),
    ):
        if value is not None:
            yield Figure(metric, name, value)


def job_figures(
    address: str, job: str, kind: str, done: int, total: int, idle: float | None = None
) -> Iterator[Figure]:
    """Yield what there is of a job.

    :param idle: seconds; None where nobody has followed it.
    """
    name = (address, job, kind)
    yield Figure("job_done_bytes", name, done)
    yield Figure("job_total_bytes", name, total)
    if idle is not None:
        yield Figure("job_seconds_since_progress", name, idle)


def work_figure(address: str, job: str, kind: str, seconds: float) -> Figure:
    """Return for how long a command of ours has been at something."""
    return Figure("job_seconds", (address, job, kind), seconds)


def room_figures(
    address: str, disk: str, room: int | None, wanted: int, free: int | None
) -> Iterator[Figure]:
    """Yield what there is of the room of a disk that is kept."""
    name = (address, disk)
    yield Figure("room_wanted_bytes", name, wanted)
    for metric, value in (("room_bytes", room), ("host_free_bytes", free)):
        if value is not None:
            yield Figure(metric, name, value)


def rendered(figures: Iterable[Figure]) -> str:
    """Write figures, each metric's together.

    :raise RequestError: there is no prometheus-client.
    """
    try:
        from prometheus_client import CollectorRegistry, generate_latest
        from prometheus_client.core import GaugeMetricFamily
    except ImportError:
        raise RequestError(
            "figures in Prometheus's format need its client library for Python",
            standing=UNTOUCHED,
            remedy="install the extra qmpblock[metrics], or Debian's python3-prometheus-client",
        ) from None
    families: dict[str, Any] = {
        name: GaugeMetricFamily(_PREFIX + name, one.help, labels=one.labels)
        for name, one in METRICS.items()
    }
    for figure in figures:
        labels = [printable(label, 1000) for label in figure.labels]
        families[figure.metric].add_metric(labels, float(figure.value))
    registry = CollectorRegistry()
    registry.register(_Seen([one for one in families.values() if one.samples]))
    text: str = generate_latest(registry).decode()
    return text


class _Seen:
    """What was seen, as prometheus-client wants to be told it."""

    def __init__(self, families: list[Any]) -> None:
        self._families = families

    def collect(self) -> list[Any]:
        return self._families
