"""What `qmpblock migrate --list FILE` does, and says."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from qmpblock.cli.app import WARNED, Options, emit, warn
from qmpblock.cli.migration import WHAT, said_of_guest
from qmpblock.cli.progress import Reporter, reporting_many

if TYPE_CHECKING:
    from qmpblock.cli.recording import Recorder
    from qmpblock.policy.migrating import ListedResult
    from qmpblock.policy.migrations import ListedMigration
    from qmpblock.qemu.job import Progress

__all__ = ["migrated_list"]

_WORDS = {
    "done": "gone over",
    "there": "there already",
    "presumed": "presumably there already",
    "failed": "failed",
}
_PRESUMED = (
    "the source cannot be reached, and a guest that came by a migration runs at the destination; "
    "see that it is this one"
)


async def migrated_list(options: Options, file: str, recorder: Recorder) -> int:
    """Migrate what a list says, and say how; return the exit code."""
    from qmpblock.migration.way import way_over
    from qmpblock.policy.migrating import migrate_all
    from qmpblock.policy.migrations import load_migrations
    from qmpblock.qemu.connection import NBDAccess

    wanted = load_migrations(file)
    access = NBDAccess(tls_creds=options.tls_creds, insecure=options.insecure)
    for one in wanted.migrations:
        if one.over is not None:
            way_over(one.over, access, access)  # refused before any is touched
    with reporting_many() as begin:
        reporters: dict[ListedMigration, Reporter] = {}

        def show(one: ListedMigration, seen: Progress) -> None:
            if one not in reporters:
                shown = begin(one.name)
                reporters[one] = recorder.also(shown, one.source, f"{WHAT} {one.name}")
            reporters[one](seen)

        results = await migrate_all(
            wanted, connect=options.connect, progress=show, ended=_say_ended
        )
    if options.json:
        emit(json.dumps({"migrations": [_document(one) for one in results]}, indent=2) + "\n")
    else:
        _sum_up(results)
    if any(one.state == "failed" for one in results):
        return 1
    warned = any(one.state == "presumed" or (one.result and one.result.warnings) for one in results)
    return WARNED if warned else 0


def _document(one: ListedResult) -> dict[str, Any]:
    """Return the entry of docs/schema/migrate-list.schema.json."""
    return {
        "source": one.migration.source,
        "destination": one.migration.destination,
        "state": one.state,
        "seconds": one.seconds,
        "result": None if one.result is None else asdict(one.result),
        "error": None if one.error is None else str(one.error),
    }


def _say_ended(one: ListedResult) -> None:
    name = one.migration.name
    if one.error is not None:
        first, *rest = str(one.error).splitlines()
        click.echo(f"{name}: " + click.style("failed: ", fg="red", bold=True) + first, err=True)
        for line in rest:
            click.echo(f"  {line}", err=True)
    if one.state == "presumed":
        warn((f"{name}: {_PRESUMED}",))
    if one.result is not None:
        warn(tuple(f"{name}: {text}" for text in one.result.warnings))


def _sum_up(results: tuple[ListedResult, ...]) -> None:
    for one in results:
        said = "failed; see above"
        if one.state == "there":
            said = "the guest had gone over before"
        elif one.state == "presumed":
            said = "presumably the guest had gone over before"
        elif one.result is not None:
            said = f"{said_of_guest(one.result)}, and all took {one.seconds:.1f} s"
        click.echo(f"{one.migration.name}: {said}")
    counts = {state: sum(one.state == state for one in results) for state in _WORDS}
    told = ", ".join(f"{number} {_WORDS[state]}" for state, number in counts.items() if number)
    click.echo(f"{len(results)} migration{'s' if len(results) != 1 else ''}: {told}")
