"""Unchanged: that both sides have, once the guest stands, the devices and media that were compared.

To send the memory may take minutes. QEMU plugs in nothing at a source meanwhile, but takes out what
its guest lets go of; at a destination it does both, and the medium of a drive can be taken out of
either. A guest that goes on then finds another machine, sooner or later.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from qmpblock.errors import BusyError, Error, printable

if TYPE_CHECKING:
    from qmpblock.qemu.connection import Connection

__all__ = ["Unchanged"]

_ANSWER = 2.0  # seconds for a word from a QEMU that is well
_CHILD = "child<"
#: Where QEMU has the devices that somebody asked for, those without an id in the second one.
_CONTAINERS = ("/machine/peripheral", "/machine/peripheral-anon")


@dataclass(frozen=True)
class _Has:
    """What one side has.

    :ivar devices: their types, by what they are called.
    :ivar media: the node of each drive's medium, or None, by the drive.
    """

    devices: Mapping[str, str] = field(default_factory=dict)
    media: Mapping[str, str | None] = field(default_factory=dict)


class Unchanged:
    """What a migration's two sides have. `note` before they are compared, `check` at last."""

    def __init__(self, source: Connection, destination: Connection) -> None:
        self._sides = {"source": source, "destination": destination}
        self._had: dict[str, _Has] = {}

    async def note(self) -> None:
        """Note what they have."""
        had = await asyncio.gather(*(_look(vm, drives=True) for vm in self._sides.values()))
        self._had = dict(zip(self._sides, had, strict=True))

    async def check(self) -> None:
        """See that they have it still, now that the guest stands: so it has to be quick.

        Whether a tray is open is the guest's, and goes along. A source that does not answer any
        more is none to be compared: whoever has the guest go on sees to that.

        :raise BusyError: one has something else.
        :raise Error: the destination does not answer.
        """
        now = await asyncio.gather(
            *(self._look_again(side) for side in self._sides), return_exceptions=True
        )
        for side, has in zip(self._sides, now, strict=True):
            if isinstance(has, TimeoutError | Error):
                if side == "destination":
                    raise Error(
                        "the destination had all of the guest, and does not answer any more"
                    ) from None
            elif isinstance(has, BaseException):
                raise has
            elif wrong := _differs(self._had[side], has):
                raise BusyError(
                    f"while the guest's memory was sent, somebody changed the {side}: "
                    + "; ".join(wrong),
                    remedy="have both alike again, and leave them so until the guest has gone over",
                )

    async def _look_again(self, side: str) -> _Has:
        async with asyncio.timeout(_ANSWER):  # a drive that is new is a device that is new
            return await _look(self._sides[side], drives=bool(self._had[side].media))


async def _look(vm: Connection, *, drives: bool) -> _Has:
    """Read what a side has; `drives`: and their media."""
    lists = [("qom-list", {"path": path}) for path in _CONTAINERS]
    named, unnamed, *blocks = await vm.monitor.read(*lists, *(["query-block"] if drives else []))
    devices = {
        str(one["name"]): str(one["type"]).removeprefix(_CHILD).removesuffix(">")
        for one in (*named, *unnamed)
        if str(one["type"]).startswith(_CHILD)
    }
    return _Has(devices, dict(map(_medium, filter(_is_drive, *blocks))) if drives else {})


def _is_drive(block: Mapping[str, Any]) -> bool:
    return block.get("removable") is True


def _medium(block: Mapping[str, Any]) -> tuple[str, str | None]:
    inserted = block.get("inserted")
    node = None if inserted is None else str(inserted.get("node-name"))
    return str(block.get("device") or block.get("qdev")), node


def _differs(had: _Has, has: _Has) -> list[str]:
    wrong = []
    for name in sorted({*had.devices, *has.devices}):
        was, now = had.devices.get(name), has.devices.get(name)
        if was != now:
            how = "plugged in" if was is None else "taken out" if now is None else "exchanged"
            wrong.append(f"{printable(now or was or '')} {printable(name)} was {how}")
    for name, was in had.media.items():
        now = has.media.get(name, was)  # of a drive that is gone it is said above
        if was != now:
            how = "inserted" if was is None else "taken out" if now is None else "changed"
            wrong.append(f"the medium of {printable(name)} was {how}")
    return wrong
