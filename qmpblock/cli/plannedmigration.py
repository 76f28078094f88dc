"""Lines that say what a migration would be: of `qmpblock migrate --dry-run`. And as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from qmpblock.errors import printable
from qmpblock.sizes import human_size

if TYPE_CHECKING:
    from qmpblock.migration.compare import Finding
    from qmpblock.migration.rehearsal import PlannedMigration

__all__ = ["document", "said", "said_finding"]

_OF_LAYERS = {"all": "", "top": ", the active layer alone"}
_SPACE = {
    "thin": "",
    "full": ", with host space for every byte",
    "same": ", with host space for what has it now",
}


def said(planned: PlannedMigration) -> Iterator[str]:
    """Yield the lines, but for the findings."""
    for disk in planned.disks:
        which = _OF_LAYERS[disk.layers] + _SPACE[disk.allocation]
        much = "how much cannot be told" if disk.data is None else human_size(disk.data)
        yield (
            f"{printable(disk.disk)}: {human_size(disk.size)}, would be copied to "
            f"{printable(disk.target)}{which}: {much}; the guest writes {_rate(disk.written)} to it"
        )
    for one in planned.bitmaps:
        yield f"{printable(one.disk)}: its dirty bitmap {printable(one.name)} would go along"
    if planned.storage_daemon:
        yield "a storage daemon would have the destination's images until they are copied"
    expected = planned.prediction
    if expected is None:
        return
    dirtied = "not measured" if planned.dirtied is None else f"{_rate(planned.dirtied)} are written"
    yield f"memory: {human_size(planned.memory)}; {dirtied}"
    if planned.wire is not None:
        by = f" by {printable(planned.over)}" if planned.over else ""
        yield (
            f"wire{by}: {_rate(planned.wire.rate)}, {planned.wire.latency * 1e3:.1f} ms there and "
            "back (measured)" + (f", kept to {_rate(planned.speed)}" if planned.speed else "")
        )
    else:
        yield f"wire: not measured: {planned.unmeasured}"
    yield f"{expected.why} (needed: more than {_rate(expected.needed)})"
    if expected.seconds is not None:
        yield (
            f"about {expected.disks:.0f} s for the disks, {expected.memory:.0f} s for the memory; "
            f"the guest then stands for about {expected.downtime:.1f} s"
        )
    elif expected.converges is None:
        yield "how long it takes depends on the wire: say with --speed what it carries"
    yield from planned.notices
    if planned.pause is not None:
        yield f"all of its memory takes about {planned.pause:.1f} s while the guest is paused"


def said_finding(one: Finding) -> Iterator[str]:
    """Yield the lines of a finding."""
    yield f"{'refused' if one.refused else 'warning'}: {one.what}"
    yield f"  QEMU would notice {one.kind.noticed}: {one.kind.otherwise}"
    yield f"  remedy: {one.kind.remedy}"


def document(planned: PlannedMigration) -> dict[str, Any]:
    """Return the document of docs/schema/migration-plan.schema.json."""
    findings = [
        {
            "name": one.name,
            "what": one.what,
            "refused": one.refused,
            "noticed": one.kind.noticed,
            "otherwise": one.kind.otherwise,
            "remedy": one.kind.remedy,
        }
        for one in planned.findings
    ]
    whole = asdict(planned)
    expected = planned.prediction
    return {
        **whole,
        "refused": planned.refused,
        "findings": findings,
        "prediction": None
        if expected is None
        else {**asdict(expected), "seconds": expected.seconds},
    }


def _rate(speed: float) -> str:
    return f"{human_size(round(speed))}/s"
