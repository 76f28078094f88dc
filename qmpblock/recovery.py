"""Recovery after a controller died: what it left in a VM is undone, or carried on to its end."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from qmpblock.cancellation import undisturbed
from qmpblock.chains.jobs import carry_on
from qmpblock.chains.owner import check_manager_knows
from qmpblock.chains.stranded import recover_stranded
from qmpblock.changes.change import Change
from qmpblock.changes.identity import identify
from qmpblock.changes.leftovers import Recovery, clear
from qmpblock.changes.record import Record
from qmpblock.changes.settle import settle
from qmpblock.changes.step import Choice, Step
from qmpblock.changes.survey import find
from qmpblock.errors import UNTOUCHED, RecordError, printable
from qmpblock.host.statedirectory import state_directory
from qmpblock.qemu.lock import Holder

if TYPE_CHECKING:
    from qmpblock.qemu.connection import Connection
    from qmpblock.qemu.job import Progress

__all__ = ["Recovery", "recover"]


async def recover(
    vm: Connection,
    choice: Choice = Choice.UNDO,
    *,
    dry_run: bool = False,
    tell: Callable[[str, Step], None] | None = None,
    progress: Callable[[str, Progress], None] | None = None,
) -> list[Recovery]:
    """Undo, or carry on, what controllers that died left in a VM. See `VM.recover`."""
    continued = partial(_carry_on, progress=progress) if choice is Choice.CONTINUE else None
    recoveries = await clear(vm, dry_run=dry_run, tell=tell, carry_on=continued)
    recoveries += await recover_stranded(vm, dry_run=dry_run, tell=tell)
    await check_manager_knows(vm)
    return recoveries


async def _carry_on(
    vm: Connection,
    holder: Holder,
    record: Record,
    note: Callable[[Step], None],
    *,
    progress: Callable[[str, Progress], None] | None,
) -> bool:
    """Take a dead controller's change over, and bring it to its end."""
    journal = find(record, await identify(vm))
    if journal is None and record.pivot and (await vm.graph()).job(record.job) is not None:
        raise _without_journal(record)
    change = Change(vm, record)
    if not await change.adopt(holder, journal):
        return False
    if record.job:
        note(Step("follow", record.job, "it is carried on to its end"))
        what = record.describe()
        await carry_on(vm, change, None if progress is None else partial(progress, what))
    else:
        await undisturbed(settle(vm, record, change.journal, Choice.CONTINUE, note))
        await undisturbed(change.end())
    return True


def _without_journal(record: Record) -> RecordError:
    return RecordError(
        f"the journal of {record.describe()} is not in {printable(state_directory())}: what tells "
        "which image is newest if QEMU dies could not be kept, so the job is not carried on",
        standing=UNTOUCHED,
        remedy="run this where it was begun, as the same user and with the same QMPBLOCK_STATE; or "
        "undo it: qmpblock recover ADDRESS",
        run=record.run,
    )
