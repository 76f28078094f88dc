"""What a target is to be like, besides what it holds; and what cannot be had, and why. Pure.

======  ==================================================================================
thin    what reads as zeros takes no host space
full    every byte has host space, before anything is copied
like    what the disk has host space for has it in the copy, too, and nothing else has
======  ==================================================================================

Of the options some make sense for some targets only. Each is refused by name where it does not,
with what to do instead: an option that is passed over is noticed when it is too late.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from qmpblock.errors import UNTOUCHED, RequestError, UnsupportedError, printable

__all__ = [
    "ALLOCATIONS",
    "LARGEST_CLUSTER",
    "Allocation",
    "Kind",
    "Settings",
    "Shape",
    "Use",
    "check_shape",
    "metadata_of",
]

Allocation = Literal["thin", "full", "like"]
Kind = Literal["file", "device", "server"]

ALLOCATIONS: tuple[Allocation, ...] = ("thin", "full", "like")

_CLUSTER = 64 << 10  # bytes; QEMU's default of qcow2
_SMALLEST = 512  # bytes of a cluster, of QEMU's qcow2
LARGEST_CLUSTER = 2 << 20
"""Likewise."""

_L1 = 32 << 20  # bytes of a qcow2 image's first table, at most, so far as QEMU opens it


class Settings(NamedTuple):
    """Two settings of a block node, as QEMU spells them."""

    discard: str
    detect_zeroes: str

    @property
    def options(self) -> dict[str, str]:
        """As options of the node."""
        return {"discard": self.discard, "detect-zeroes": self.detect_zeroes}


@dataclass(frozen=True)
class Shape:
    """What the targets of one copy are to be like.

    :ivar allocation: which bytes have host space.
    :ivar cluster: of a qcow2 image, in bytes; None: QEMU's default.
    :ivar compress: whether what it holds is compressed.
    :ivar direct: whether it is written past the host's page cache.
    :ivar reflink: whether it shares the blocks of the disk's files.
    """

    allocation: Allocation = "thin"
    cluster: int | None = None
    compress: bool = False
    direct: bool = False
    reflink: bool = False

    @property
    def unit(self) -> int:
        """Bytes of a cluster of a qcow2 image."""
        return self.cluster or _CLUSTER

    def room(self, fmt: str, reserved: int) -> int:
        """Return how many bytes of its file system an image takes, at most.

        :param reserved: of what it holds, in whole clusters.
        """
        return reserved + (metadata_of(reserved, self.unit) if fmt == "qcow2" else 0)

    def while_copying(self, *, of_view: bool) -> Settings:
        """Return the settings of a target's node while a job writes to it.

        :param of_view: whether it reads a view, of which QEMU does not tell which zeros are none
            that somebody wrote.
        """
        if self.allocation == "full":  # no zero takes away what was reserved
            return Settings("ignore", "on" if of_view else "off")
        thin = of_view or self.allocation == "thin"
        return Settings("unmap", "unmap" if thin else "off")

    def while_moving(self, guests: Settings, *, raw: bool) -> Settings:
        """Return the settings of the node to which a guest goes over, until it is there.

        :param guests: what its disk has.
        :param raw: whether it is a raw image.
        """
        if self.allocation != "thin":
            return self.while_copying(of_view=False)
        # In a raw image zeros take space unless they may be discarded; in a qcow2 one they do not.
        return Settings("unmap", guests.detect_zeroes) if raw else guests


@dataclass(frozen=True)
class Use:
    """What a shape is asked for.

    :ivar target: for people.
    :ivar format: `qcow2` or `raw`.
    :ivar size: of the disk, in bytes.
    :ivar kind: of the target.
    :ivar start: whether the copy is of the start.
    :ivar pivot: whether the guest goes over to it.
    :ivar overlay: whether it lies on a backing image.
    :ivar encrypted: whether the disk is.
    """

    target: str
    format: str
    size: int
    kind: Kind = "file"
    start: bool = True
    pivot: bool = False
    overlay: bool = False
    encrypted: bool = False


def check_shape(shape: Shape, use: Use) -> None:
    """Refuse what cannot be had of a target.

    :raise RequestError: the options contradict each other, or are none.
    :raise UnsupportedError: QEMU, or the target, cannot do it.
    """
    if shape.allocation not in ALLOCATIONS:
        raise RequestError(
            f"the allocation {printable(shape.allocation)} is none of {', '.join(ALLOCATIONS)}",
            standing=UNTOUCHED,
        )
    checks: dict[str, Callable[[Shape, Use], None]] = {"full": _full, "like": _like}
    if shape.allocation in checks:
        checks[shape.allocation](shape, use)
    if shape.cluster is not None:
        _cluster(shape.cluster, use)
    if shape.compress:
        _compress(shape, use)
    if shape.direct:
        _direct(use)
    if shape.reflink:
        _reflink(shape, use)


def metadata_of(size: int, cluster: int) -> int:
    """Return how many bytes the tables of a qcow2 image take that holds all of a disk, at most.

    :param size: of the disk, in bytes; `cluster`: of the image.
    """
    clusters = -(-size // cluster)
    tables = -(-clusters * 8 // cluster) * cluster  # where each cluster is
    counts = -(-(clusters + clusters // 8) * 2 // cluster) * cluster  # by how many each is used
    return tables + counts + tables // 8 + 8 * cluster + (1 << 20)


def _full(_: Shape, use: Use) -> None:
    if use.kind != "file" and use.format != "raw":
        raise UnsupportedError(
            f"a qcow2 image on {printable(use.target)} takes what it holds of the room that is "
            "there: there is nothing to be reserved",
            standing=UNTOUCHED,
            remedy="leave --allocation full out, or make the copy raw",
        )
    if use.overlay:
        raise RequestError(
            "an image that lies on another (--layers top) is not to have host space for all of "
            "itself: it would hide all of what it lies on",
            standing=UNTOUCHED,
            remedy="copy all layers, or leave --allocation full out",
        )


def _like(_: Shape, use: Use) -> None:
    if use.kind != "file":
        what = "a block device has" if use.kind == "device" else "an NBD server has, it has"
        raise UnsupportedError(
            f"{printable(use.target)} cannot have host space like a disk's: what {what} by itself",
            standing=UNTOUCHED,
            remedy="copy into a file; or leave --allocation like out",
        )
    if use.encrypted:
        raise UnsupportedError(
            "what an encrypted copy has host space for is seen with its key alone, which the VM "
            "has: so it cannot be made like the disk's",
            standing=UNTOUCHED,
            remedy="take --allocation thin or full",
        )


def _cluster(cluster: int, use: Use) -> None:
    if use.format != "qcow2":
        raise RequestError(
            f"{printable(use.target)} is to be {use.format}, and --cluster-size is of qcow2 images",
            standing=UNTOUCHED,
            remedy="leave it out, or make the copy qcow2 (--format qcow2)",
        )
    if not _SMALLEST <= cluster <= LARGEST_CLUSTER or cluster & (cluster - 1):
        raise RequestError(
            f"a cluster of {cluster} bytes is none of qcow2: it is a power of two from 512 to 2M",
            standing=UNTOUCHED,
        )
    most = _L1 // 8 * (cluster // 8) * cluster
    if use.size > most:
        raise RequestError(
            f"with clusters of {cluster} bytes a qcow2 image holds no more than {most} bytes, and "
            f"the disk has {use.size}",
            standing=UNTOUCHED,
            remedy="take larger ones",
        )


def _compress(shape: Shape, use: Use) -> None:
    if use.format != "qcow2":
        raise RequestError(
            f"{printable(use.target)} is to be {use.format}, which knows no compression",
            standing=UNTOUCHED,
            remedy="make the copy qcow2 (--format qcow2)",
        )
    if not use.start:
        raise UnsupportedError(
            "a copy of the end cannot be compressed: QEMU compresses what is written once, and "
            "what the guest wrote meanwhile is written again (its mirror jobs do not compress)",
            standing=UNTOUCHED,
            remedy="copy the start (--at start)",
        )
    if shape.allocation != "thin":
        raise RequestError(
            "a compressed copy takes what it needs, and cannot have host space for more "
            f"(--allocation {shape.allocation})",
            standing=UNTOUCHED,
            remedy="leave one of the two out",
        )
    if use.encrypted:
        raise UnsupportedError(
            "the copy of an encrypted disk is encrypted, and QEMU stores compressed clusters "
            "unencrypted",
            standing=UNTOUCHED,
            remedy="leave --compress out",
        )


def _direct(use: Use) -> None:
    if use.kind == "server":
        raise UnsupportedError(
            f"{printable(use.target)} is reached through a socket: no page cache of this host is "
            "between, to be bypassed (--direct)",
            standing=UNTOUCHED,
            remedy="have the server bypass its own (qemu-nbd --cache=none)",
        )
    if use.pivot:
        raise UnsupportedError(
            "the guest goes on in the copy, which the VM has open as it has its disk open now: "
            "past the page cache or not is the VM's own setting (cache.direct)",
            standing=UNTOUCHED,
            remedy="leave --direct out; or copy the start or the end (--at)",
        )


def _reflink(shape: Shape, use: Use) -> None:
    if use.kind != "file":
        raise UnsupportedError(
            f"{printable(use.target)} cannot share blocks (--reflink): two files of one file "
            "system can",
            standing=UNTOUCHED,
            remedy="leave --reflink out, or copy into a file beside the disk's",
        )
    if not use.start:
        raise UnsupportedError(
            "a copy of the end shares no blocks (--reflink): QEMU's mirror reads and writes them",
            standing=UNTOUCHED,
            remedy="copy the start (--at start)",
        )
    if shape.compress or shape.allocation != "thin":
        other = "--compress" if shape.compress else f"--allocation {shape.allocation}"
        raise RequestError(
            f"blocks that are shared (--reflink) are the disk's own, and {other} wants others",
            standing=UNTOUCHED,
            remedy="leave one of the two out",
        )
    if use.encrypted:
        raise UnsupportedError(
            "the blocks of an encrypted disk are of no use in another image, which has a key of "
            "its own (--reflink)",
            standing=UNTOUCHED,
            remedy="leave --reflink out",
        )
