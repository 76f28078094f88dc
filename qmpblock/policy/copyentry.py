"""What a policy says of copies: a target for each disk, and the options of `qmpblock copy`.

::

    copies:
      - disks: {vd0: /srv/web.qcow2, vd1: /srv/data.qcow2}   # of one instant
        verify: yes
      - ...

    copies: {vd0: /srv/web.qcow2}                            # one entry, all options as by default

A copy is wanted to be there: whole, under its name. So what is asked for are files, whose name says
that they are whole; of a device or a server nothing does. And the guest stays where it is.
"""

from __future__ import annotations

import posixpath
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from qmpblock.copying.options import CopyOptions, parse_latency
from qmpblock.copying.plan import FORMATS
from qmpblock.copying.shape import ALLOCATIONS
from qmpblock.copying.target import NBDTarget, parse_target
from qmpblock.errors import RequestError, printable
from qmpblock.policy.values import filled_in, keep_free_in, number_in, speed_in
from qmpblock.sizes import LARGEST, Amount

if TYPE_CHECKING:
    from qmpblock.yamltext import Mapping

__all__ = ["NOT_IN_POLICIES", "OPTIONS", "CopyPolicy", "read_copies"]


@dataclass(frozen=True)
class CopyPolicy:
    """Copies that are to be there, of one disk, or of several at one instant.

    :ivar address: of the VM's monitor.
    :ivar targets: each DISK there, and the file of its copy.
    :ivar keep_free: of the file systems of the targets.
    :ivar order: those with less come first; of the same, disks before copies.
    :ivar place: file, line and column.
    """

    address: str
    targets: tuple[tuple[str, str], ...]
    options: CopyOptions = field(default_factory=CopyOptions)
    keep_free: Amount | None = None
    order: int = 0
    place: str = ""

    @property
    def disk(self) -> str:
        """The disks, as the policy calls them."""
        return ", ".join(disk for disk, _ in self.targets)

    @property
    def speed(self) -> int:
        """Bytes a second; 0 is no limit."""
        return self.options.speed

    @property
    def wanted(self) -> str:
        """What is wanted, in few words."""
        files = ", ".join(file for _, file in self.targets)
        return f"a copy in {files}" if len(self.targets) == 1 else f"copies in {files}"


def _latency(entry: Mapping, key: str) -> float:
    seconds = parse_latency(text := entry.text(key))
    if seconds is None:
        entry.refuse(key, f"{printable(text)!r} is not a time such as 20ms, 0.5s or 20")
    return seconds


def _size(entry: Mapping, key: str) -> int:
    size = entry.size(key)
    if size > LARGEST:
        entry.refuse(key, "is more than 2^63 - 1 bytes")
    return size


def _flag(entry: Mapping, key: str) -> bool:
    return entry.flag(key, default=False)


def _one_of(*known: str) -> Callable[[Mapping, str], str]:
    return lambda entry, key: entry.choice(key, known, known[0])


#: How each option of a copy is read; the keys are those of `CopyOptions`.
OPTIONS: dict[str, Callable[[Mapping, str], object]] = {
    "at": _one_of("start", "end"),
    "format": _one_of(*FORMATS),
    "layers": _one_of("all", "top"),
    "allocation": _one_of(*ALLOCATIONS),
    "cluster_size": _size,
    "compress": _flag,
    "direct": _flag,
    "reflink": _flag,
    "force": _flag,
    "verify": _flag,
    "fleece": filled_in,
    "fleece_limit": _size,
    "latency": _latency,
}

#: Those that it has not: `speed` has the policy's own default; the guest stays where it is; no
#: server is a target; and what is there already is gone on from where that can be.
NOT_IN_POLICIES = frozenset({"speed", "pivot", "tls_creds", "resume"})


def read_copies(
    vm: Mapping, address: str, speed: int, keep_free: Amount | None, taken: dict[str, str]
) -> list[CopyPolicy]:
    """Read the copies of a VM; none where it names none.

    :param speed: of an entry that says nothing else; also `keep_free`.
    :param taken: the files that are targets already, and where that is said; is added to.
    :raise RequestError: what it says is wrong; as the mapping's.
    """
    if "copies" not in vm:
        return []
    if vm.is_mapping("copies"):
        below = vm.mapping("copies")
        options = CopyOptions(speed=speed)
        return [CopyPolicy(address, _targets(below, taken), options, keep_free, 0, below.place)]
    return [_entry(one, address, speed, keep_free, taken) for one in vm.mappings("copies")]


def _entry(
    entry: Mapping, address: str, speed: int, keep_free: Amount | None, taken: dict[str, str]
) -> CopyPolicy:
    targets = _targets(entry.mapping("disks"), taken)
    words: dict[str, Any] = {key: read(entry, key) for key, read in OPTIONS.items() if key in entry}
    options = CopyOptions(speed=speed_in(entry, speed), **words)
    if options.verify and options.at == "end":
        entry.refuse("verify", "goes with `at: start`: of a copy of the end no point is left")
    if options.layers == "top" and options.format == "raw":
        entry.refuse("format", "is raw, which cannot lie on a backing image, as `layers: top` asks")
    copies = CopyPolicy(
        address,
        targets,
        options,
        keep_free_in(entry, keep_free),
        number_in(entry, "order", 0),
        entry.place,
    )
    entry.finish()
    return copies


def _targets(below: Mapping, taken: dict[str, str]) -> tuple[tuple[str, str], ...]:
    targets = []
    for disk in below.keys():  # noqa: SIM118 - no dict
        if not disk:
            below.refuse(disk, "is no disk's name")
        file = filled_in(below, disk)
        try:
            target = parse_target(file)
        except RequestError as error:
            below.refuse(disk, error.message)
        if isinstance(target, NBDTarget):
            below.refuse(
                disk,
                f"{printable(file)} is a server's, of which nothing tells that a copy there is "
                "whole; a policy asks for files. For that there is: qmpblock copy",
            )
        path = posixpath.normpath(target.path)
        if path in taken:
            below.refuse(disk, f"{printable(file)} is a target already: {taken[path]}")
        taken[path] = below.place
        targets.append((disk, file))
    if not targets:
        below.refuse(None, "names no disk")
    return tuple(targets)
