"""Arbiter: the object at the source that says on which side of a migration the guest goes on.

When QEMU's migration is complete both sides are paused, and either could go on. Whoever is to
have one go on adds this object to the source first, and says in it which side that is; `object-add`
of a name that is there fails: so of all who try, at either side, one wins. It stays for as long as
that QEMU. The mark is at the destination, by the same name, and says the same, so that it can be
told where the source is gone. Both say it of a guest that is to stay stopped: the mark goes as the
migration is finished, and so does all else of ours at the source.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from qmpblock.changes.record import VMIdentity
from qmpblock.errors import BusyError, RecordError, printable
from qmpblock.export.server import delete_object
from qmpblock.migration.states import Side
from qmpblock.names import handover_name
from qmpblock.qemu.lock import data_of
from qmpblock.qemu.monitor import Monitor
from qmpblock.qemu.refusals import duplicate_object, tolerate
from qmpblock.versioned import UnreadableError, plain, read, stamped, unstamped

__all__ = ["claim", "decided", "is_stopped", "mark", "went_to", "withdraw"]

_SIDE, _TO, _STOPPED = "side", "to", "stopped"


async def claim(
    source: Monitor,
    run: str,
    side: Side,
    *,
    to: VMIdentity | None = None,
    stopped: bool = False,
) -> Side:
    """Have the arbiter say where the guest goes on; return what it says.

    :param side: what it is to say, if nobody was faster.
    :param to: the destination, for who asks later where the guest has gone.
    :param stopped: whether the guest is to stay stopped there, as somebody had it.
    :raise RecordError: somebody was, and what he said cannot be read.
    :raise BusyError: somebody was, and has taken it away again: he is done with it.
    :raise DisconnectedError: whether it was said is unknown.
    """
    more = ({} if to is None else {_TO: plain(_briefly(to))}) | _stays(stopped)
    if await _add(source, run, side, more):
        return side
    said = await decided(source, run)
    if said is None:  # and no word for us: that it is free now says nothing of what was done by it
        raise BusyError(
            "another controller has decided meanwhile on which side of the migration the guest "
            "goes on, and has ended it",
            standing="neither side was continued by this one",
            remedy="look which one runs: qmpblock recover ADDRESS",
        )
    return said


def _briefly(process: VMIdentity) -> VMIdentity:
    """Say no more than names it: the guest stands, and QEMU takes a monitor's bytes one by one."""
    return replace(process, name="", monitor="") if process.pid else process


async def mark(destination: Monitor, run: str, *, stopped: bool = False) -> None:
    """Say at the destination that the arbiter decided for it. Idempotent.

    :param stopped: whether the guest is to stay stopped, as somebody had it.
    """
    await _add(destination, run, Side.DESTINATION, _stays(stopped))


def _stays(stopped: bool) -> dict[str, Any]:
    return {_STOPPED: True} if stopped else {}


async def decided(monitor: Monitor, run: str) -> Side | None:
    """Return what the arbiter, or the mark, says; None where there is none.

    :raise RecordError: it cannot be read.
    """
    name = handover_name(run)
    text = await data_of(monitor, name)
    if text is None:
        return None
    try:
        return Side(unstamped(json.loads(text))[_SIDE])
    except (UnreadableError, KeyError, TypeError, ValueError) as error:
        raise RecordError(
            f"the object {name} in this VM is ours by its name and cannot be read: "
            f"{printable(error)}",
            standing="it says on which side of a migration the guest goes on; neither was touched",
            remedy="have the qmpblock that wrote it, or a newer one, recover",
            run=run,
        ) from None


async def went_to(source: Monitor, run: str) -> VMIdentity | None:
    """Return the process to which the arbiter says that the guest has gone; None: it says none."""
    if await decided(source, run) is not Side.DESTINATION:
        return None
    said = (await _said(source, run)).get(_TO)
    try:
        return None if said is None else read(VMIdentity, said)
    except UnreadableError:
        return None  # of a version that says it otherwise


async def is_stopped(monitor: Monitor, run: str) -> bool:
    """Whether the arbiter, or the mark, says that the guest is to stay stopped.

    To be asked where there is one.
    """
    return bool((await _said(monitor, run)).get(_STOPPED))


async def _said(monitor: Monitor, run: str) -> dict[str, Any]:
    return unstamped(json.loads(await data_of(monitor, handover_name(run)) or "{}"))


async def withdraw(monitor: Monitor, run: str) -> None:
    """Remove it, where there is no other side any more. Idempotent."""
    await delete_object(monitor, handover_name(run))


async def _add(monitor: Monitor, run: str, side: Side, more: Mapping[str, Any]) -> bool:
    """Add it; False if it is there."""
    data = json.dumps(stamped({_SIDE: side.value, **more}), separators=(",", ":"))
    arguments = {"qom-type": "secret", "id": handover_name(run), "data": data}
    return await tolerate(duplicate_object, monitor.execute("object-add", arguments))
