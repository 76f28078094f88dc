"""Policies: one YAML file says what the disks of running VMs are to be like.

It is read into frozen dataclasses; no VM is touched. Reading is strict: an unknown key, a
missing one, a size that is none, two wishes that contradict each other are a `PolicyError`
that names the file, the line, the column and the key. docs/policy.md is the reference of the
format.

A layer is named by its node or file name, never by its depth (`@1`): depths change as layers
leave the chain, so that a policy applied twice would mean something else.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from qmpblock.address import parse_monitor
from qmpblock.errors import RequestError, printable
from qmpblock.policy.copyentry import CopyPolicy, read_copies
from qmpblock.policy.values import amount_in, filled_in, keep_free_in, number_in, speed_in
from qmpblock.sizes import LARGEST, Amount
from qmpblock.yamltext import Mapping, read_mapping, read_text

__all__ = [
    "DiskPolicy",
    "Part",
    "Policy",
    "PolicyError",
    "load_policy",
    "parse_policy",
]

Allocation = Literal["as-is", "thin", "full", "like"]


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
    :ivar copies: that are to be there, in the order in which they are made.
    """

    source: str
    disks: tuple[DiskPolicy, ...]
    parallel: int = 1
    copies: tuple[CopyPolicy, ...] = ()

    @property
    def wishes(self) -> tuple[DiskPolicy | CopyPolicy, ...]:
        """All, in the order in which they are done: of the same `order`, disks before copies."""
        every: list[DiskPolicy | CopyPolicy] = [*self.disks, *self.copies]
        return tuple(sorted(every, key=lambda one: one.order))


def load_policy(path: Path | str) -> Policy:
    """Read a policy from a file.

    :raise PolicyError: it cannot be read, or what it says is wrong.
    """
    return parse_policy(read_text(path, PolicyError), source=printable(path))


def parse_policy(text: str, *, source: str = "<text>") -> Policy:
    """Read a policy from YAML text.

    :param source: what errors call it.
    :raise PolicyError: what it says is wrong.
    """
    top = read_mapping(text, source, PolicyError)
    parallel = number_in(top, "parallel", 1)
    if parallel < 1:
        top.refuse("parallel", "must be at least 1")
    general = DiskPolicy("", "", speed=speed_in(top, 0), keep_free=keep_free_in(top, None))
    disks: list[DiskPolicy] = []
    copies: list[CopyPolicy] = []
    seen: set[tuple[object, str]] = set()
    taken: dict[str, str] = {}
    for vm in top.mappings("vms"):
        address = filled_in(vm, "address")
        try:
            parsed = parse_monitor(address)
        except RequestError as error:
            vm.refuse("address", error.message)
        copies += read_copies(vm, address, general.speed, general.keep_free, taken)
        for entry in vm.mappings("disks") if "disks" in vm or "copies" not in vm else ():
            disk = _disk(entry, address, general)
            if (parsed, disk.disk) in seen:
                entry.refuse("disk", f"{printable(disk.disk)} of this VM stands here twice")
            seen.add((parsed, disk.disk))
            disks.append(disk)
        vm.finish()
    top.finish()
    disks.sort(key=lambda disk: disk.order)
    copies.sort(key=lambda one: one.order)
    return Policy(source, tuple(disks), parallel, tuple(copies))


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
        like_format = filled_in(pattern, "format") if "format" in pattern else None
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
        disk=filled_in(entry, "disk"),
        independent=bool(independent),
        base=base,
        allocation=allocation,
        like=like,
        like_format=like_format,
        parts=parts,
        speed=speed_in(entry, general.speed),
        keep_free=keep_free_in(entry, general.keep_free),
        ahead=_ahead(entry),
        order=number_in(entry, "order", 0),
        place=entry.place,
    )
    entry.finish()
    return disk


def _part(entry: Mapping) -> Part:
    offset = amount_in(entry, "offset") if "offset" in entry else Amount()
    length = amount_in(entry, "length") if "length" in entry else None
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


def _layer(entry: Mapping, key: str) -> str:
    text = filled_in(entry, key)
    if text.startswith("@"):
        entry.refuse(
            key,
            f"{printable(text)} is a depth, which changes as layers leave the chain; give the "
            "layer's node name or file name",
        )
    return text


def _ahead(entry: Mapping) -> Amount | None:
    if "ahead" not in entry:
        return None
    amount = amount_in(entry, "ahead")
    if amount.of(LARGEST) == 0:
        entry.refuse("ahead", "is nothing; leave it out where no room is wanted")
    return amount
