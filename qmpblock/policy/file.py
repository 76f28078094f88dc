"""Policies: one YAML file says what the disks of running VMs are to be like.

It is read into frozen dataclasses; no VM is touched. Reading is strict: an unknown key, a
missing one, a size that is none, two wishes that contradict each other are a `PolicyError`
that names the file, the line, the column and the key. docs/policy.md is the reference of the
format.

A layer is named by its node or file name, never by its depth (`@1`): depths change as layers
leave the chain, so that a policy applied twice would mean something else.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Literal

from qmpblock.address import parse_address
from qmpblock.errors import RequestError, printable
from qmpblock.sizes import LARGEST, Amount, parse_size
from qmpblock.yamltext import MOST_BYTES, Mapping, read_mapping

__all__ = [
    "DiskPolicy",
    "Part",
    "Policy",
    "PolicyError",
    "load_policy",
    "parse_policy",
]

Allocation = Literal["as-is", "thin", "full", "like"]

_PERCENT = re.compile(r"(\d{1,3}(?:\.\d{1,6})?)\s?%")
_WHOLE = re.compile(r"-?\d{1,9}")


class PolicyError(RequestError):
    """A policy is wrong; the message names the file, the line, the column and the key."""


@dataclass(frozen=True)
class Part:
    """A range of a disk whose size is not known yet. `length` None: up to the disk's end."""

    offset: Amount = field(default_factory=Amount)
    length: Amount | None = None


@dataclass(frozen=True)
class DiskPolicy:
    """What one disk is to be like.

    :ivar address: of the VM's monitor.
    :ivar disk: the DISK there.
    :ivar independent: nothing is to depend on the backing chain.
    :ivar base: the LAYER above which the chain is to have but one layer; None: leave it.
    :ivar like: the LAYER, or image file, for `allocation` like; `like_format` is its format,
        where it is not in the chain.
    :ivar parts: where `allocation` holds; empty is the whole disk.
    :ivar speed: bytes a second; 0 is no limit.
    :ivar keep_free: of the image's host file system.
    :ivar ahead: room to be reserved for what the guest will write; None: none.
    :ivar order: those with less come first.
    :ivar place: file, line and column.
    """

    address: str
    disk: str
    independent: bool = False
    base: str | None = None
    allocation: Allocation = "as-is"
    like: str | None = None
    like_format: str | None = None
    parts: tuple[Part, ...] = ()
    speed: int = 0
    keep_free: Amount | None = None
    ahead: Amount | None = None
    order: int = 0
    place: str = ""

    @property
    def backing(self) -> str:
        """What is wanted of the backing chain, in a word or two."""
        if self.base is not None:
            return f"base {self.base}"
        return "independent" if self.independent else "keep"

    @property
    def wanted(self) -> str:
        """What is wanted, in few words."""
        allocation = f"like {self.like}" if self.allocation == "like" else self.allocation
        ahead = f", ahead {self.ahead}" if self.ahead is not None else ""
        return f"backing {self.backing}, allocation {allocation}{ahead}"


@dataclass(frozen=True)
class Policy:
    """A policy file.

    :ivar disks: in the order in which they are done.
    :ivar parallel: how many at once.
    """

    source: str
    disks: tuple[DiskPolicy, ...]
    parallel: int = 1


def load_policy(path: Path | str) -> Policy:
    """Read a policy from a file.

    :raise PolicyError: it cannot be read, or what it says is wrong.
    """
    try:
        with Path(path).open(encoding="utf-8") as file:
            text = file.read(MOST_BYTES + 1)
    except (OSError, ValueError) as error:
        raise PolicyError(f"cannot read {printable(path)}: {printable(error)}") from None
    return parse_policy(text, source=printable(path))


def parse_policy(text: str, *, source: str = "<text>") -> Policy:
    """Read a policy from YAML text.

    :param source: what errors call it.
    :raise PolicyError: what it says is wrong.
    """
    top = read_mapping(text, source, PolicyError)
    parallel = _number(top, "parallel", 1)
    if parallel < 1:
        top.refuse("parallel", "must be at least 1")
    general = DiskPolicy("", "", speed=_speed(top, 0), keep_free=_keep_free(top, None))
    disks: list[DiskPolicy] = []
    seen: set[tuple[object, str]] = set()
    for vm in top.mappings("vms"):
        address = _filled(vm, "address")
        try:
            parsed = parse_address(address)
        except RequestError as error:
            vm.refuse("address", error.message)
        for entry in vm.mappings("disks"):
            disk = _disk(entry, address, general)
            if (parsed, disk.disk) in seen:
                entry.refuse("disk", f"{printable(disk.disk)} of this VM stands here twice")
            seen.add((parsed, disk.disk))
            disks.append(disk)
        vm.finish()
    top.finish()
    disks.sort(key=lambda disk: disk.order)
    return Policy(source, tuple(disks), parallel)


def _disk(entry: Mapping, address: str, general: DiskPolicy) -> DiskPolicy:
    base = independent = None
    if entry.is_mapping("backing"):
        below = entry.mapping("backing")
        base = _layer(below, "base")
        below.finish()
    else:
        independent = entry.choice("backing", ("keep", "independent"), "keep") == "independent"
    allocation: Allocation = "as-is"
    like = like_format = None
    if entry.is_mapping("allocation"):
        pattern = entry.mapping("allocation")
        allocation, like = "like", _layer(pattern, "like")
        like_format = _filled(pattern, "format") if "format" in pattern else None
        pattern.finish()
    else:
        chosen = entry.choice("allocation", ("as-is", "thin", "full"), "as-is")
        allocation = "thin" if chosen == "thin" else "full" if chosen == "full" else "as-is"
    parts = tuple(_part(one) for one in entry.mappings("ranges")) if "ranges" in entry else ()
    if parts and allocation == "as-is":
        entry.refuse("ranges", "say where to allocate, but the allocation is as-is")
    if parts and allocation == "thin" and independent:
        entry.refuse("ranges", "a disk becomes independent whole: ranges go with full and like")
    disk = DiskPolicy(
        address=address,
        disk=_filled(entry, "disk"),
        independent=bool(independent),
        base=base,
        allocation=allocation,
        like=like,
        like_format=like_format,
        parts=parts,
        speed=_speed(entry, general.speed),
        keep_free=_keep_free(entry, general.keep_free),
        ahead=_ahead(entry),
        order=_number(entry, "order", 0),
        place=entry.place,
    )
    entry.finish()
    return disk


def _part(entry: Mapping) -> Part:
    offset = _amount(entry, "offset") if "offset" in entry else Amount()
    length = _amount(entry, "length") if "length" in entry else None
    entry.finish()
    if length == Amount() or (length is not None and length.percent == 0):
        entry.refuse("length", "is nothing")
    if (
        length is not None
        and offset.percent is not None
        and length.percent is not None
        and offset.percent + length.percent > 100
    ):
        entry.refuse("length", "reaches past the end of the disk")
    return Part(offset, length)


def _filled(entry: Mapping, key: str) -> str:
    text = entry.text(key)
    if not text:
        entry.refuse(key, "is empty")
    return text


def _layer(entry: Mapping, key: str) -> str:
    text = _filled(entry, key)
    if text.startswith("@"):
        entry.refuse(
            key,
            f"{printable(text)} is a depth, which changes as layers leave the chain; give the "
            "layer's node name or file name",
        )
    return text


def _number(entry: Mapping, key: str, default: int) -> int:
    text = entry.text(key, str(default))
    if not _WHOLE.fullmatch(text):
        entry.refuse(key, f"{printable(text)!r} is not a whole number")
    return int(text)


def _speed(entry: Mapping, default: int) -> int:
    speed = entry.size("speed", default)
    if speed > LARGEST:
        entry.refuse("speed", "is more than 2^63 - 1 bytes a second")
    return speed


def _keep_free(entry: Mapping, default: Amount | None) -> Amount | None:
    return _amount(entry, "keep_free") if "keep_free" in entry else default


def _ahead(entry: Mapping) -> Amount | None:
    if "ahead" not in entry:
        return None
    amount = _amount(entry, "ahead")
    if amount.of(LARGEST) == 0:
        entry.refuse("ahead", "is nothing; leave it out where no room is wanted")
    return amount


def _amount(entry: Mapping, key: str) -> Amount:
    text = entry.text(key)
    share = _PERCENT.fullmatch(text)
    if share is not None:
        percent = Fraction(share[1])
        if percent > 100:
            entry.refuse(key, f"{printable(text)!r} is more than the whole")
        return Amount(percent=percent)
    size = parse_size(text)
    if size is None or size > LARGEST:
        entry.refuse(key, f"{printable(text)!r} is neither a size such as 64K or 1G, nor a percent")
    return Amount(size)
