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
    from qmpblock.qemu.transport import Event

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
    """What a migration's two sides have. `note` before they are compared, `check` at last; `close`.

    Of the source's devices its events tell what goes, so that it has not to be asked.
    """

    def __init__(self, source: Connection, destination: Connection) -> None:
        self._source = source
        self._destination = destination
        self._had = _Has(), _Has()
        self._gone = source.monitor.subscribe("DEVICE_DELETED", match=_is_whole)

    async def note(self) -> None:
        """Note what they have."""
        self._gone.pending()
        self._had = await asyncio.gather(
            _look(self._source, devices=False, drives=True),
            _look(self._destination, devices=True, drives=True),
        )

    async def check(self) -> None:
        """See that they have it still, now that the guest stands: so it has to be quick.

        Whether a tray is open is the guest's, and goes along. A source that does not answer any
        more is none to be compared: whoever has the guest go on sees to that.

        :raise BusyError: one has something else.
        :raise Error: the destination does not answer.
        """
        here, there = await asyncio.gather(
            self._look_again(self._source, self._had[0], devices=False),
            self._look_again(self._destination, self._had[1], devices=True),
            return_exceptions=True,
        )
        if isinstance(there, TimeoutError | Error):
            raise Error("the destination had all of the guest, and does not answer any more")
        if isinstance(here, TimeoutError | Error):
            here = self._had[0]
        for side, had, has in zip(("source", "destination"), self._had, (here, there), strict=True):
            if isinstance(has, BaseException):
                raise has
            wrong = _differs(had, has)
            if side == "source":
                wrong += [f"{_called(event)} was taken out" for event in self._gone.pending()]
            if wrong:
                raise BusyError(
                    f"while the guest's memory was sent, somebody changed the {side}: "
                    + "; ".join(wrong),
                    remedy="have both alike again, and leave them so until the guest has gone over",
                )

    async def _look_again(self, vm: Connection, had: _Has, *, devices: bool) -> _Has:
        drives = bool(had.media)  # one that is new is a device that is new
        if not devices and not drives:
            return had
        async with asyncio.timeout(_ANSWER):
            return await _look(vm, devices=devices, drives=drives)

    def close(self) -> None:
        """Hear no more of the source. Idempotent."""
        self._gone.close()


def _is_whole(event: Event) -> bool:
    """Whether a device has gone that somebody had asked for; not a part of one."""
    path = str(event["data"].get("path"))
    return path.rpartition("/")[0] in _CONTAINERS


def _called(event: Event) -> str:
    return printable(event["data"].get("device") or event["data"]["path"])


async def _look(vm: Connection, *, devices: bool, drives: bool) -> _Has:
    """Read what a side has: its devices, the media of its drives."""
    lists = [("qom-list", {"path": path}) for path in _CONTAINERS if devices]
    found = await vm.monitor.read(*lists, *(["query-block"] if drives else []))
    children = {
        str(one["name"]): str(one["type"]).removeprefix(_CHILD).removesuffix(">")
        for listed in found[: len(lists)]
        for one in listed
        if str(one["type"]).startswith(_CHILD)
    }
    return _Has(children, dict(map(_medium, filter(_is_drive, found[-1]))) if drives else {})


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
