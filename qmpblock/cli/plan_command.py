"""`qmpblock plan`."""

from __future__ import annotations

import json
from functools import partial
from posixpath import basename
from typing import TYPE_CHECKING, Any

import click

from qmpblock.cli import copiesoutput
from qmpblock.cli.app import WARNED, Options, emit, unmanaged_option, warn
from qmpblock.cli.app import command as make_command
from qmpblock.cli.copiesoutput import plan_document
from qmpblock.errors import printable

if TYPE_CHECKING:
    from qmpblock.allocation.room import RoomPlan
    from qmpblock.policy.copies import CopiesPlan
    from qmpblock.policy.run import DiskPlan
    from qmpblock.policy.steps import Changes, Picture

__all__ = ["command", "document", "documents", "summary"]


@make_command
@click.argument("policy", type=click.Path(dir_okay=False))
@unmanaged_option
async def command(options: Options, policy: str, unmanaged: bool) -> int:
    """Show what POLICY, a YAML file, would do to the disks of running VMs. Changes nothing.

    For each disk: today's picture and the wanted one, what is to be copied and reserved, how
    long that takes at the rate asked for, and which images leave the chain. For each copy: that
    it is there, or how it would be made.
    """
    from qmpblock.policy.file import load_policy
    from qmpblock.policy.run import plan

    plans = await plan(load_policy(policy), connect=partial(options.connect, unmanaged=unmanaged))
    if options.json:
        emit(json.dumps(documents(plans), indent=2) + "\n")
    else:
        for number, one in enumerate(plans):
            if number:
                click.echo()
            _show(one)
        if len(plans) > 1:
            _show_sum(plans)
    warn(tuple(f"{printable(one.name)}: {text}" for one in plans for text in one.warnings))
    if any(one.error for one in plans):
        return 1
    return WARNED if any(one.warnings for one in plans) else 0


def documents(plans: tuple[DiskPlan | CopiesPlan, ...]) -> dict[str, Any]:
    """Return the document of docs/schema/plan.schema.json."""
    disks, copies = apart(plans)
    return {
        "disks": [document(one) for one in disks],
        "copies": [plan_document(one) for one in copies],
    }


def apart(
    plans: tuple[DiskPlan | CopiesPlan, ...],
) -> tuple[list[DiskPlan], list[CopiesPlan]]:
    """Return the plans of disks, and those of copies."""
    from qmpblock.policy.copies import CopiesPlan

    copies = [one for one in plans if isinstance(one, CopiesPlan)]
    return [one for one in plans if not isinstance(one, CopiesPlan)], copies


def document(one: DiskPlan) -> dict[str, Any]:
    """Return the entry of a disk."""
    changes = one.changes
    return {
        "address": one.policy.address,
        "disk": one.name,
        "backing": one.policy.backing,
        "allocation": one.policy.allocation,
        "today": None if one.today is None else _picture(one.today),
        "wanted": None if changes is None else _picture(changes.wanted),
        "steps": [
            {"verb": s.verb, "offset": s.offset, "length": s.length, "bytes": s.bytes}
            for s in (changes.steps if changes else ())
        ],
        "move": changes.move if changes else 0,
        "zeros": changes.zeros if changes else 0,
        "reserve": changes.reserve if changes else 0,
        "leaving": list(changes.leaving) if changes else [],
        "ahead": None if one.ahead is None else _ahead(one.ahead),
        "speed": one.policy.speed,
        "seconds": changes.seconds(one.policy.speed) if changes else None,
        "warnings": list(one.warnings),
        "error": None if one.error is None else str(one.error),
    }


def _picture(picture: Picture) -> dict[str, Any]:
    from qmpblock.extents.allocationmap import layer_extents_json

    return {
        "map": picture.guest.to_qemu_img(),
        "layers": [
            {"file": file, "extents": layer_extents_json(own)}
            for file, own in zip(picture.files, picture.layers, strict=True)
        ],
    }


def _ahead(room: RoomPlan) -> dict[str, Any]:
    return {"wanted": room.wanted, "room": room.room, "reserve": room.reserve, "full": room.full}


def summary(one: DiskPlan | CopiesPlan) -> str:
    """Say in a line what is to be done."""
    from qmpblock.policy.copies import CopiesPlan

    if isinstance(one, CopiesPlan):
        return copiesoutput.summary(one)
    if not one.has_work:
        return "nothing to do: it is as the policy says"
    parts = []
    if one.changes is not None and one.changes.steps:
        parts.append(_summary(one.changes, one.policy.speed))
    if one.ahead is not None and one.ahead.reserve:
        parts.append(said_ahead(one.ahead))
    return "; ".join(parts)


def said_ahead(room: RoomPlan) -> str:
    """Say in few words what there is of the room ahead of the guest."""
    from qmpblock.sizes import human_size

    text = "room ahead of the guest: "
    if room.room is None:
        text += (
            f"{human_size(room.wanted)}, some of which may be there: the file system cannot tell"
        )
    else:
        text += f"{human_size(room.room)} of {human_size(room.wanted)}"
        text += f", {human_size(room.reserve)} to reserve" if room.reserve else ""
    return text + (", no blank is left then" if room.full else "")


def _summary(changes: Changes, speed: int) -> str:
    from qmpblock.sizes import human_size

    parts = [f"{human_size(changes.move)} to copy", f"{human_size(changes.reserve)} to reserve"]
    if changes.zeros:
        parts.append(f"{human_size(changes.zeros)} to become explicit zeros")
    seconds = changes.seconds(speed)
    if seconds is not None:
        parts.append(f"{seconds:.0f} s at {human_size(speed)}/s")
    text = ", ".join(parts)
    if changes.leaving:
        text += f"; leaving the chain: {', '.join(printable(file) for file in changes.leaving)}"
    return text


def _show(one: DiskPlan | CopiesPlan) -> None:
    from qmpblock.policy.copies import CopiesPlan

    if isinstance(one, CopiesPlan):
        copiesoutput.show(one)
    else:
        _show_disk(one)
    if one.error is not None:
        first, *rest = str(one.error).splitlines()
        click.echo(click.style("cannot be done: ", fg="red", bold=True) + first)
        for line in rest:
            click.echo(f"  {line}")


def _show_disk(one: DiskPlan) -> None:
    click.echo(
        click.style(printable(one.name), bold=True)
        + f" of {printable(one.policy.address)}: {printable(one.policy.wanted)}"
    )
    changes = one.changes
    if one.today is not None:
        click.echo(f"\ntoday\n{_drawn(one.today, one.today)}", nl=False)
        if changes is not None and changes.steps:
            click.echo(f"\nwanted\n{_drawn(changes.wanted, one.today)}", nl=False)
    if changes is not None:
        click.echo(f"\n{summary(one)}")
    if one.ahead is not None and not one.ahead.reserve:
        click.echo(said_ahead(one.ahead))


def _drawn(picture: Picture, widest: Picture) -> str:
    from rich.console import Console

    from qmpblock.pictures.text import text_picture

    console = Console(highlight=False)
    # Both pictures get the same room for names, so that they compare column by column.
    room = max(len(basename(file)) for file in widest.files)
    names = [basename(file).ljust(room) for file in picture.files]
    return text_picture(
        list(zip(reversed(names), reversed(picture.layers), strict=True)),
        picture.guest,
        width=console.width,
        ascii=not (console.encoding or "").lower().startswith("utf"),
        color=console.is_terminal and not console.no_color,
    )


def _show_sum(every: tuple[DiskPlan | CopiesPlan, ...]) -> None:
    from qmpblock.sizes import human_size

    plans, copies = apart(every)
    if copies:
        pending = sum(one.has_work and one.error is None for one in copies)
        failed = sum(one.error is not None for one in copies)
        click.echo(
            f"\n{len(copies)} entr{'ies' if len(copies) != 1 else 'y'} of copies: "
            f"{pending} to make, {len(copies) - pending - failed} there already"
            + (f", {failed} that cannot be done" if failed else "")
        )
    if not plans:
        return
    doable = [one for one in plans if one.changes is not None and one.error is None]
    move = sum(one.changes.move for one in doable if one.changes)
    reserve = sum(one.changes.reserve for one in doable if one.changes)
    reserve += sum(one.ahead.reserve for one in doable if one.ahead)
    busy = sum(one.has_work for one in doable)
    failed = len(plans) - len(doable)
    click.echo(
        f"\n{len(plans)} disks: {busy} to change, {len(doable) - busy} as they should be"
        + (f", {failed} that cannot be done" if failed else "")
        + f"; {human_size(move)} to copy, {human_size(reserve)} to reserve"
    )
