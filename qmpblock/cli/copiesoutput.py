"""What `qmpblock plan` and `qmpblock apply` say of the copies of a policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from qmpblock.cli.plannedcopy import said, said_amount
from qmpblock.errors import printable
from qmpblock.sizes import human_size

if TYPE_CHECKING:
    from qmpblock.policy.copies import CopiesPlan, CopiesResult

__all__ = ["count", "plan_document", "result_document", "said_result", "show", "summary"]

_WORDS = {"done": "made", "nothing": "there already", "failed": "failed"}


def plan_document(one: CopiesPlan) -> dict[str, Any]:
    """Return the entry of docs/schema/plan.schema.json."""
    return {
        "address": one.policy.address,
        "disks": [{"disk": disk, "target": file} for disk, file in one.policy.targets],
        "state": "failed" if one.error else "pending" if one.has_work else "there",
        "planned": None if one.planned is None else asdict(one.planned),
        "warnings": list(one.warnings),
        "error": None if one.error is None else str(one.error),
    }


def result_document(one: CopiesResult) -> dict[str, Any]:
    """Return the entry of docs/schema/apply.schema.json."""
    return {
        "address": one.policy.address,
        "disks": [{"disk": disk, "target": file} for disk, file in one.policy.targets],
        "state": one.state,
        "made": None if one.made is None else asdict(one.made),
        "seconds": one.seconds,
        "warnings": list(one.warnings),
        "error": None if one.error is None else str(one.error),
    }


def summary(one: CopiesPlan) -> str:
    """Say in a line what is to be done."""
    if one.planned is None:
        files = ", ".join(printable(file) for file in one.there)
        return f"nothing to do: {files} {'is' if len(one.there) == 1 else 'are'} there"
    files = ", ".join(printable(disk.target) for disk in one.planned.disks)
    return f"to be copied to {files}: {said_amount(one.planned.read, one.planned.write)}"


def show(one: CopiesPlan) -> None:
    """Print what is to be done, and how."""
    click.echo(
        click.style(printable(one.name), bold=True)
        + f" of {printable(one.policy.address)}: {printable(one.policy.wanted)}\n"
    )
    if one.planned is not None:
        for line in said(one.planned):
            click.echo(line)
    elif one.error is None:
        click.echo(summary(one))


def said_result(one: CopiesResult) -> str:
    """Say in a line what was done."""
    assert one.made is not None  # it is for those that were made
    files = ", ".join(
        f"{printable(disk.target)} ({human_size(disk.size)})" for disk in one.made.disks
    )
    held = f"; the guest's I/O was held for {one.made.held * 1000:.1f} ms" if one.made.held else ""
    return f"copied to {files}, in {one.seconds:.1f} s{held}"


def count(results: Sequence[CopiesResult]) -> str:
    """Say of how many copies there are what became of them."""
    counts = {state: sum(one.state == state for one in results) for state in _WORDS}
    told = ", ".join(f"{number} {_WORDS[state]}" for state, number in counts.items() if number)
    return f"{len(results)} entr{'ies' if len(results) != 1 else 'y'} of copies: {told}"
