"""`qmpblock apply`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from qmpblock.cli import copiesoutput
from qmpblock.cli.app import WARNED, Options, emit, unmanaged_option, warn
from qmpblock.cli.app import command as make_command
from qmpblock.cli.plan_command import summary
from qmpblock.cli.progress import Reporter, reporting_many
from qmpblock.cli.recording import Recorder, metrics_option, recording
from qmpblock.errors import printable

if TYPE_CHECKING:
    from qmpblock.allocation.room import RoomResult
    from qmpblock.errors import Error
    from qmpblock.policy.copies import CopiesPlan, CopiesResult
    from qmpblock.policy.copyentry import CopyPolicy
    from qmpblock.policy.file import DiskPolicy
    from qmpblock.policy.run import DiskPlan, DiskResult
    from qmpblock.policy.watch import Watched
    from qmpblock.qemu.job import Progress

__all__ = ["command", "document", "documents"]


@make_command
@click.argument("policy", type=click.Path(dir_okay=False))
@click.option(
    "--watch",
    is_flag=True,
    help="Then stay, and keep the room ahead of every disk that has `ahead`.",
)
@metrics_option
@unmanaged_option
async def command(
    options: Options, policy: str, watch: bool, metrics: str | None, unmanaged: bool
) -> int:
    """Make the disks of running VMs as POLICY, a YAML file, says. The guests go on.

    What is as it should be is left alone, so it can be applied again at any time, also after
    it was interrupted or killed: it does what is left. So is a copy that is there. A disk that
    fails does not keep the others from being done. `qmpblock plan` shows beforehand what it will
    do.

    Where it gives host space to qcow2 or QED, and QEMU itself dies meanwhile, run `qmpblock
    recover IMAGE` before the image is started again.

    With --watch it goes on until every VM has ended, or Ctrl-C: whenever less than half of a
    disk's room is left, the whole is reserved anew. It keeps the connection to each VM.
    """
    with recording(metrics) as recorder:
        return await _applied(options, policy, recorder, watch=watch, unmanaged=unmanaged)


async def _applied(
    options: Options, policy: str, recorder: Recorder, *, watch: bool, unmanaged: bool
) -> int:
    from qmpblock.policy.file import load_policy
    from qmpblock.policy.run import apply
    from qmpblock.policy.watch import Watch

    loaded = load_policy(policy)
    keeper = (
        Watch(
            loaded,
            connect=options.connect,
            tell=partial(_told_room, recorder),
            ended=partial(_told_end, recorder),
        )
        if watch
        else None
    )
    with reporting_many() as begin:
        shown = _Shown(begin, recorder)
        told = _Warnings()

        def ended(one: DiskResult | CopiesResult) -> None:
            told.after(one)
            shown.ended(one.policy)

        results = await apply(
            loaded,
            connect=partial(options.connect, unmanaged=unmanaged),
            planned=told.before,
            progress=shown.progress,
            ended=ended,
        )
    if not options.json:
        _sum_up(results)
    watched = keeper.disks if keeper is not None else {}
    for one in _apart(results)[0] if keeper is not None else ():
        if one.ahead is not None:
            recorder.room(one.policy.address, one.name, one.ahead)
    try:
        if keeper is not None:
            count = f"{len(watched)} disk{'s' if len(watched) != 1 else ''}"
            click.echo(f"keeping the room ahead of {count}; Ctrl-C ends it", err=True)
            await keeper.run()
    finally:
        if options.json:
            emit(json.dumps(documents(results, watched), indent=2) + "\n")
    if any(one.state == "failed" for one in results) or any(w.error for w in watched.values()):
        return 1
    return WARNED if any(one.warnings for one in results) else 0


def documents(
    results: tuple[DiskResult | CopiesResult, ...], watched: Mapping[DiskPolicy, Watched]
) -> dict[str, Any]:
    """Return the document of docs/schema/apply.schema.json."""
    disks, copies = _apart(results)
    return {
        "disks": [document(one, watched.get(one.policy)) for one in disks],
        "copies": [copiesoutput.result_document(one) for one in copies],
    }


def _apart(
    results: tuple[DiskResult | CopiesResult, ...],
) -> tuple[list[DiskResult], list[CopiesResult]]:
    from qmpblock.policy.copies import CopiesResult

    copies = [one for one in results if isinstance(one, CopiesResult)]
    return [one for one in results if not isinstance(one, CopiesResult)], copies


def document(one: DiskResult, watched: Watched | None = None) -> dict[str, Any]:
    """Return the entry of a disk."""
    return {
        "address": one.policy.address,
        "disk": one.name,
        "state": one.state,
        "allocated": one.allocated,
        "reserved": one.reserved,
        "dropped": list(one.dropped),
        "held": one.held,
        "seconds": one.seconds,
        "ahead": None if one.ahead is None else _ahead(one.ahead),
        "watch": None if watched is None else _watched(watched),
        "warnings": list(one.warnings),
        "error": None if one.error is None else str(one.error),
    }


def _ahead(room: RoomResult) -> dict[str, Any]:
    return {
        "file": room.file,
        "wanted": room.wanted,
        "before": room.before,
        "reserved": room.reserved,
        "room": room.room,
        "full": room.full,
    }


def _watched(one: Watched) -> dict[str, Any]:
    return {
        "file": None if one.last is None else one.last.file,
        "room": None if one.last is None else one.last.room,
        "top_ups": one.top_ups,
        "reserved": one.reserved,
        "error": None if one.error is None else str(one.error),
    }


def _told_room(recorder: Recorder, one: Watched) -> None:
    assert one.last is not None  # it was just told
    recorder.room(one.policy.address, one.name, one.last)
    _say_room(one)


def _told_end(recorder: Recorder, one: Watched) -> None:
    recorder.forget(one.policy.address, one.name)
    _say_watched(one)


def _say_room(one: Watched) -> None:
    """Say a line about the room of a disk: when, which, how much was reserved, what there is."""
    assert one.last is not None  # it was just told
    text = f"{datetime.now():%Y-%m-%d %H:%M:%S} {_name(one.policy, one.name)}: "
    if one.last.error is not None:
        first, *_ = str(one.last.error).splitlines()
        text += click.style("no room: ", fg="red", bold=True) + f"{first}; it is tried again"
    else:
        text += f"{one.last.reserved:,} bytes reserved"
    room = "" if one.last.room is None else f"; {one.last.room:,} bytes of room"
    click.echo(text + room + (", no blank is left" if one.last.full else ""), err=True)


def _say_watched(one: Watched) -> None:
    if one.error is None or (one.last is not None and one.last.error is one.error):
        click.echo(f"{_name(one.policy, one.name)}: the VM has ended", err=True)
    else:
        _say_failure(_name(one.policy, one.name), one.error)


class _Shown:
    """One reporter for each disk, from its first news on."""

    def __init__(self, begin: Any, recorder: Recorder) -> None:
        self._begin = begin
        self._recorder = recorder
        self._reporters: dict[DiskPolicy | CopyPolicy, Reporter] = {}

    def progress(self, wanted: DiskPolicy | CopyPolicy, seen: Progress) -> None:
        if wanted not in self._reporters:
            shown = self._begin(_name(wanted, wanted.disk))
            self._reporters[wanted] = self._recorder.also(shown, wanted.address, _work(wanted))
        self._reporters[wanted](seen)

    def ended(self, wanted: DiskPolicy | CopyPolicy) -> None:
        self._recorder.forget(wanted.address, _work(wanted))


def _name(wanted: DiskPolicy | CopyPolicy, disk: str) -> str:
    return f"{printable(disk)} of {printable(wanted.address)}"


def _work(wanted: DiskPolicy | CopyPolicy) -> str:
    return f"apply {wanted.disk}"


class _Warnings:
    """Says what comes, and at the end what was not foreseen: each warning once."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def before(self, plans: tuple[DiskPlan | CopiesPlan, ...]) -> None:
        for one in plans:
            if one.has_work and one.error is None:
                name = _name(one.policy, one.name)
                click.echo(f"{name}: {summary(one)}", err=True)
                self._warn(name, one.warnings)

    def after(self, one: DiskResult | CopiesResult) -> None:
        name = _name(one.policy, one.name)
        if one.error is not None:
            _say_failure(name, one.error)
        self._warn(name, one.warnings)

    def _warn(self, name: str, warnings: tuple[str, ...]) -> None:
        texts = tuple(f"{name}: {text}" for text in warnings)
        warn(tuple(text for text in texts if text not in self._said))
        self._said.update(texts)


def _say_failure(name: str, error: Error) -> None:
    first, *rest = str(error).splitlines()
    click.echo(f"{name}: " + click.style("failed: ", fg="red", bold=True) + first, err=True)
    for line in rest:
        click.echo(f"  {line}", err=True)


def _sum_up(every: tuple[DiskResult | CopiesResult, ...]) -> None:
    from qmpblock.policy.copies import CopiesResult

    results, copies = _apart(every)
    for one in every:
        name = _name(one.policy, one.name)
        if one.state == "failed":
            click.echo(f"{name}: failed; see above")
            continue
        if one.state == "nothing":
            click.echo(f"{name}: nothing to do")
            continue
        if isinstance(one, CopiesResult):
            click.echo(f"{name}: {copiesoutput.said_result(one)}")
            continue
        click.echo(
            f"{name}: {one.allocated:,} bytes allocated from below, {one.reserved:,} reserved, "
            f"in {one.seconds:.1f} s"
        )
        for file in one.dropped:
            click.echo(f"  no longer in the chain: {printable(file)}")
        if one.ahead is not None and one.ahead.reserved:
            click.echo(f"  {one.ahead.reserved:,} bytes of room ahead of the guest reserved")
        if one.held:
            click.echo(f"  the guest's I/O was held for {one.held * 1000:.1f} ms at the most")
    if copies:
        click.echo(copiesoutput.count(copies))
    if not results:
        return
    counts = {state: sum(one.state == state for one in results) for state in _WORDS}
    said = ", ".join(f"{count} {_WORDS[state]}" for state, count in counts.items() if count)
    click.echo(f"{len(results)} disk{'s' if len(results) != 1 else ''}: {said}")


_WORDS = {"done": "done", "nothing": "as they should be", "failed": "failed"}
