"""`qmpblock apply`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from qmpblock.cli.app import WARNED, Options, emit
from qmpblock.cli.app import command as make_command
from qmpblock.cli.chainwork import warn
from qmpblock.cli.plan_command import summary
from qmpblock.cli.progress import Reporter, reporting_many
from qmpblock.errors import printable

if TYPE_CHECKING:
    from qmpblock.job import Progress
    from qmpblock.policy import DiskPlan, DiskResult
    from qmpblock.policyfile import DiskPolicy

__all__ = ["command", "document"]


@make_command
@click.argument("policy", type=click.Path(dir_okay=False))
async def command(options: Options, policy: str) -> int:
    """Make the disks of running VMs as POLICY, a YAML file, says. The guests go on.

    What is as it should be is left alone, so it can be applied again at any time, also after
    it was interrupted or killed: it does what is left. A disk that fails does not keep the
    others from being done. `qmpblock plan` shows beforehand what it will do.

    Where it gives host space to qcow2 or QED, and QEMU itself dies meanwhile, run `qmpblock
    recover IMAGE` before the image is started again.
    """
    from qmpblock.policy import apply
    from qmpblock.policyfile import load_policy

    found = load_policy(policy)
    with reporting_many() as begin:
        shown = _Shown(begin)
        results = await apply(
            found,
            connect=options.connect,
            planned=_say_what_comes,
            progress=shown.progress,
            ended=_say_the_end,
        )
    if options.json:
        emit(json.dumps({"disks": [document(one) for one in results]}, indent=2) + "\n")
    else:
        _sum_up(results)
    if any(one.state == "failed" for one in results):
        return 1
    return WARNED if any(one.warnings for one in results) else 0


def document(one: DiskResult) -> dict[str, Any]:
    """Return the entry of docs/schema/apply.schema.json."""
    return {
        "address": one.policy.address,
        "disk": one.name,
        "state": one.state,
        "allocated": one.allocated,
        "reserved": one.reserved,
        "dropped": list(one.dropped),
        "held": one.held,
        "seconds": one.seconds,
        "warnings": list(one.warnings),
        "error": None if one.error is None else str(one.error),
    }


class _Shown:
    """One reporter for each disk, from its first news on."""

    def __init__(self, begin: Any) -> None:
        self._begin = begin
        self._reporters: dict[DiskPolicy, Reporter] = {}

    def progress(self, wanted: DiskPolicy, seen: Progress) -> None:
        if wanted not in self._reporters:
            self._reporters[wanted] = self._begin(_name(wanted, wanted.disk))
        self._reporters[wanted](seen)


def _name(wanted: DiskPolicy, disk: str) -> str:
    return f"{printable(disk)} of {printable(wanted.address)}"


def _say_what_comes(plans: tuple[DiskPlan, ...]) -> None:
    for one in plans:
        if one.changes is not None and one.changes.steps and one.error is None:
            what = summary(one.changes, one.policy.speed)
            click.echo(f"{_name(one.policy, one.name)}: {what}", err=True)


def _say_the_end(one: DiskResult) -> None:
    name = _name(one.policy, one.name)
    if one.error is not None:
        first, *rest = str(one.error).splitlines()
        click.echo(f"{name}: " + click.style("failed: ", fg="red", bold=True) + first, err=True)
        for line in rest:
            click.echo(f"  {line}", err=True)
    warn(tuple(f"{name}: {text}" for text in one.warnings))


def _sum_up(results: tuple[DiskResult, ...]) -> None:
    for one in results:
        name = _name(one.policy, one.name)
        if one.state == "failed":
            click.echo(f"{name}: failed; see above")
            continue
        if one.state == "nothing":
            click.echo(f"{name}: nothing to do")
            continue
        click.echo(
            f"{name}: {one.allocated:,} bytes allocated from below, {one.reserved:,} reserved, "
            f"in {one.seconds:.1f} s"
        )
        for file in one.dropped:
            click.echo(f"  no longer in the chain: {printable(file)}")
        if one.held:
            click.echo(f"  the guest's I/O was held for {one.held * 1000:.1f} ms at the most")
    counts = {state: sum(one.state == state for one in results) for state in _WORDS}
    said = ", ".join(f"{count} {_WORDS[state]}" for state, count in counts.items() if count)
    click.echo(f"{len(results)} disk{'s' if len(results) != 1 else ''}: {said}")


_WORDS = {"done": "done", "nothing": "as they should be", "failed": "failed"}
