"""What the tiny guest's answers say: its lines as frozen values (`firmware/README.md`).

Pure; `guest.py` moves the lines. Each `parse_...` raises ValueError for what the protocol
does not have, never anything else.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from qmpblock.errors import RequestError, printable
from qmpblock.testing.stamps import SECTOR

__all__ = [
    "GuestDisk",
    "GuestHello",
    "Latency",
    "StressProgress",
    "parse_check",
    "parse_checksum",
    "parse_ejected",
    "parse_hello",
    "parse_latency",
    "parse_progress",
]


@dataclass(frozen=True)
class GuestDisk:
    """A disk as the guest sees it.

    :param number: what commands call it; kept until the disk is unplugged or the guest reset.
    :param where: `00:02.0` (PCI), `mmio.23`, with `/TARGET:LUN` on a SCSI controller.
    :param kind: `blk` or `scsi`.
    :param size: bytes.
    :param features: letters: r read-only, f flush, d discard, z write zeroes.
    """

    number: int
    where: str
    kind: str
    size: int
    features: frozenset[str]


@dataclass(frozen=True)
class GuestHello:
    """What the guest says of itself: its protocol's version and its disks."""

    version: int
    disks: tuple[GuestDisk, ...]

    def at(self, where: str) -> GuestDisk:
        """Return the disk at a place (`GuestDisk.where`).

        :raises RequestError: there is none.
        """
        for disk in self.disks:
            if disk.where == where:
                return disk
        places = ", ".join(disk.where for disk in self.disks) or "none"
        raise RequestError(f"the guest sees no disk at {where!r} (it sees: {places})")


@dataclass(frozen=True)
class StressProgress:
    """How far a stress run is; `acked` and `flushed` are the bounds that `stamps` checks.

    :param issued: writes issued; 1..`acked` are acknowledged, 1..`flushed` also flushed.
    :param reads: verifying reads done; `bad`: those, and blocks of a `check`, that were wrong.
    :param errors: failed requests; the first ends the run. `status`: that of the first.
    :param waiting_us: how long the oldest request has been in flight, microseconds.
    :param bad_lba: the first wrong sector that a read found, and the write it had and should
        have had.
    """

    running: bool
    issued: int
    acked: int
    flushed: int
    reads: int
    bad: int
    errors: int
    waiting_us: int = 0
    status: int | None = None
    bad_lba: int | None = None
    bad_found: int | None = None
    bad_expected: int | None = None


@dataclass(frozen=True)
class Latency:
    """Requests completed since `TinyGuest.latency` was last asked, microseconds of VM time.

    The guest's clock stands still while the VM is stopped. A request that is still in flight
    is in `waiting_us` (the oldest one's age) and in no other number.
    """

    requests: int
    mean_us: int
    longest_us: int
    waiting_us: int

    @property
    def held_us(self) -> int:
        """The longest that any request was held so far, whether it has ended or not."""
        return max(self.longest_us, self.waiting_us)


def _fields(text: str) -> dict[str, list[str]]:
    """Split ` name=value name=value` into values by name; a name may come more than once.

    :raises ValueError: it is not of that form.
    """
    fields: dict[str, list[str]] = {}
    for part in text.split():
        name, equals, value = part.partition("=")
        if not (name and equals and value):
            raise ValueError(f"{printable(part)!r} is not NAME=VALUE")
        fields.setdefault(name, []).append(value)
    return fields


def _number(fields: Mapping[str, list[str]], name: str) -> int:
    values = fields.get(name, [])
    if len(values) != 1 or not re.fullmatch(r"[0-9]{1,20}", values[0]):
        raise ValueError(f"no number {name!r} in it")
    return int(values[0])


def _optional(fields: Mapping[str, list[str]], name: str) -> int | None:
    return _number(fields, name) if name in fields else None


def parse_hello(text: str) -> GuestHello:
    """Read the fields of `*READY` and of the answer to `hello`.

    :raises ValueError: they are not of that form.
    """
    fields = _fields(text)
    disks = []
    for value in fields.get("disk", []):
        match = re.fullmatch(r"(\d{1,3}),([0-9a-z:./]+),(blk|scsi),(\d{1,20}),([rfdz]*)", value)
        if not match:
            raise ValueError(f"{printable(value)!r} describes no disk")
        number, where, kind, sectors, letters = match.groups()
        disks.append(GuestDisk(int(number), where, kind, int(sectors) * SECTOR, frozenset(letters)))
    return GuestHello(_number(fields, "version"), tuple(disks))


def parse_progress(text: str) -> StressProgress:
    """Read the answer to `progress` and `stop`, and the fields of `*DONE`.

    :raises ValueError: they are not of that form.
    """
    fields = _fields(text)
    return StressProgress(
        running=bool(_optional(fields, "running")),
        issued=_number(fields, "issued"),
        acked=_number(fields, "acked"),
        flushed=_number(fields, "flushed"),
        reads=_number(fields, "reads"),
        bad=_number(fields, "bad"),
        errors=_number(fields, "errors"),
        waiting_us=_optional(fields, "waiting_us") or 0,
        status=_optional(fields, "status"),
        bad_lba=_optional(fields, "bad_lba"),
        bad_found=_optional(fields, "bad_found"),
        bad_expected=_optional(fields, "bad_expected"),
    )


def parse_latency(text: str) -> Latency:
    """Read the answer to `latency`.

    :raises ValueError: it is not of that form.
    """
    fields = _fields(text)
    return Latency(
        requests=_number(fields, "requests"),
        mean_us=_number(fields, "mean_us"),
        longest_us=_number(fields, "longest_us"),
        waiting_us=_number(fields, "waiting_us"),
    )


def parse_checksum(text: str) -> int:
    """Read the answer to `read`.

    :raises ValueError: it is not of that form.
    """
    match = re.fullmatch(r"crc32=([0-9a-f]{8})", text)
    if not match:
        raise ValueError("no checksum in it")
    return int(match[1], 16)


def parse_check(text: str) -> tuple[int, int]:
    """Read the answer to `check`: how many blocks were read, and how many of them are wrong.

    :raises ValueError: it is not of that form.
    """
    fields = _fields(text)
    return _number(fields, "blocks"), _number(fields, "bad")


def parse_ejected(text: str) -> tuple[int, GuestHello]:
    """Read the answer to `eject`: how many unplugs were granted, and what is left.

    :raises ValueError: it is not of that form.
    """
    return _number(_fields(text), "ejected"), parse_hello(text)
