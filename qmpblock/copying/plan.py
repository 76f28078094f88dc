"""What is to be copied where, or why it must not be: decided before anything is touched. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from qmpblock.chains.plan import check_idle
from qmpblock.copying.shape import Kind, Shape, Use, check_shape
from qmpblock.copying.target import NBDTarget
from qmpblock.errors import UNTOUCHED, RequestError, UnsupportedError, printable
from qmpblock.graph.model import DiskDevice, Layer
from qmpblock.graph.options import key_secret
from qmpblock.graph.writable import check_disk

if TYPE_CHECKING:
    from qmpblock.ranges import Ranges

__all__ = ["FORMATS", "CopyPlan", "Layers", "Point", "Since", "plan_copy"]

#: What a target's file can be.
FORMATS = ("qcow2", "raw")

_LARGE = 8 << 30  # bytes of a disk
_COARSE = 1 << 20  # bytes, less of which than that is soon gone over
_FINE = 64 << 10  # bytes
_STEPS = 1 << 16

Layers = Literal["all", "top"]
Point = Literal["start", "end", "pivot"]


@dataclass(frozen=True)
class Since:
    """What an increment is to hold, and lie on: what was written since that was made.

    :ivar bitmaps: dirty bitmaps of the active layer that tell it between them.
    :ivar file: of the image that it lies on, as its header is to name it.
    :ivar format: of that one.
    """

    bitmaps: tuple[str, ...]
    file: str
    format: str = "qcow2"


@dataclass(frozen=True)
class CopyPlan:
    """One disk, and what it is to be copied to.

    :ivar file: of the target, absolute; the URI of one by NBD.
    :ivar format: of the target, `qcow2` or `raw`.
    :ivar backing: the layer that the target lies on; None where it holds everything.
    :ivar secret: the id of the secret object that encrypts the target; None where none does.
    :ivar warnings: what is worth acting on.
    :ivar server: which NBD export the target is; None where it is a file.
    :ivar block_device: whether that file is one.
    :ivar shape: what the target is to be like.
    :ivar opened: where the layers are to be frozen: how the active one is opened, for a record.
    :ivar since: of an increment; None where it holds all.
    :ivar kept: whether, should the copy fail, what there is of it is kept, to be gone on from.
    """

    device: DiskDevice
    file: str
    format: str
    backing: Layer | None = None
    secret: str | None = None
    warnings: tuple[str, ...] = ()
    server: NBDTarget | None = None
    block_device: bool = False
    shape: Shape = field(default_factory=Shape)
    opened: str = ""
    since: Since | None = None
    kept: bool = True

    @property
    def kind(self) -> Kind:
        """What the target is."""
        return "server" if self.server is not None else "device" if self.block_device else "file"

    @property
    def sync(self) -> str:
        """What QEMU calls the layers that are copied."""
        return "full" if self.backing is None else "top"

    @property
    def sync_of_disk(self) -> str:
        """The same of a job that reads the disk's own layers, and no view of them.

        Of one layer that goes into a new file the uppermost is all, and where it has nothing,
        nothing is to be written. QEMU knows that of "top" only: of "full" a backup goes over every
        chunk of the disk, and a mirror zeroes the whole target first (F23).
        """
        new = self.server is None and not self.block_device
        return "top" if new and len(self.layers) == 1 else self.sync

    @property
    def size(self) -> int:
        """Of the disk, in bytes: the target has the very same."""
        return self.device.chain.active.size

    @property
    def asks(self) -> bool:
        """Whether it is asked where the disk holds anything, for nothing else to be gone over.

        Of a small disk that takes longer than to go over it; but in a raw file QEMU reserves what
        it writes zeros to, which is given back hole by hole, up to a millisecond each. And what is
        not gone over has to read as zeros of itself in the target: in a new file, that nothing was
        reserved for.
        """
        new = self.kind == "file" and self.backing is None and self.shape.allocation != "full"
        return new and self.since is None and (self.size >= _LARGE or self.format == "raw")

    def gone_over(self, held: Ranges) -> Ranges:
        """Return what a job goes over that is to copy these ranges: in steps, not too many.

        Always the beginning, too: one that has nothing to read would not see that its point ended.
        """
        step = _FINE if self.format == "raw" else _COARSE
        while (found := held.align_out(step, self.size)).total > step * _STEPS:
            step *= 2
        return found.union(type(found)([(0, min(step, self.size))]))

    @property
    def can_be_resumed(self) -> bool:
        """Whether another copy could go on from it: not from an image that no file's name marks."""
        return self.kind == "file" or self.format == "raw"

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layers whose content is copied."""
        chain = self.device.chain
        return chain.layers if self.backing is None else chain.layers[:1]


def plan_copy(
    device: DiskDevice,
    file: str | NBDTarget,
    fmt: str | None,
    layers: Layers,
    *,
    pivot: bool,
    block_device: bool = False,
    start: bool = False,
    shape: Shape | None = None,
) -> CopyPlan:
    """Plan the copy of one disk.

    :param file: absolute; or an export.
    :param fmt: of the target; None: as the active layer's, or qcow2 where that cannot be had; raw
        by NBD, and on a block device.
    :param block_device: whether the file is one.
    :param pivot: whether the guest is to go over to it; `start`: whether it is of the start.
    :param shape: what the target is to be like; None: thin, and otherwise as QEMU has it.
    :raise UnsupportedError: it cannot be copied so.
    :raise RequestError: the words contradict each other.
    :raise BusyError: a job runs on the disk.
    """
    chain = device.chain
    active = chain.active
    check_idle(device)
    if pivot:
        check_disk(device)
    below = chain.layers[1] if layers == "top" and len(chain.layers) > 1 else None
    server = file if isinstance(file, NBDTarget) else None
    if server is not None or block_device:
        if pivot:
            raise UnsupportedError(
                f"the guest cannot go over to {printable(file)}: a copy with a pivot makes files",
                standing=UNTOUCHED,
                remedy="copy the start or the end there (--at start, --at end), or go over to a "
                "file",
            )
        fmt = fmt or "raw"
    if fmt is None:
        fmt = active.format if active.format in FORMATS and below is None else "qcow2"
    if fmt not in FORMATS:
        raise UnsupportedError(
            f"a copy of format {printable(fmt)} cannot be made; {' and '.join(FORMATS)} can",
            standing=UNTOUCHED,
        )
    if below is not None and fmt == "raw":
        raise RequestError(
            "a raw image cannot lie on a backing image, as --layers top asks",
            standing=UNTOUCHED,
            remedy="make the copy qcow2, or copy all layers",
        )
    if below is not None and (server or block_device):
        raise RequestError(
            f"an image at {printable(file)} is to hold all of a disk, and --layers top asks for "
            "one that lies on another",
            standing=UNTOUCHED,
            remedy="copy all layers, or copy into a file",
        )
    shape = shape or Shape()
    plan = CopyPlan(
        device, str(file), fmt, below, server=server, block_device=block_device, shape=shape
    )
    plan = replace(plan, secret=_secret(plan), warnings=tuple(_lost(plan)) if pivot else ())
    use = Use(
        plan.file,
        fmt,
        plan.size,
        kind=plan.kind,
        start=start,
        pivot=pivot,
        overlay=below is not None,
        encrypted=plan.secret is not None,
    )
    check_shape(shape, use)
    return plan


def _secret(plan: CopyPlan) -> str | None:
    """Return the secret object that encrypts the target, for no plaintext is to be stored.

    :raise UnsupportedError: it could not be encrypted.
    """
    encrypted = [layer for layer in plan.layers if layer.node.encrypted]
    if not encrypted:
        return None
    if plan.format != "qcow2":
        raise UnsupportedError(
            f"{encrypted[0].describe()} is encrypted, and a raw copy would hold its plaintext",
            standing=UNTOUCHED,
            remedy="make the copy qcow2: it is encrypted with the same key",
        )
    return key_secret(encrypted[0])


def _lost(plan: CopyPlan) -> Iterator[str]:
    """Say what stays with the image that the guest leaves."""
    for bitmap in plan.device.chain.active.node.bitmaps:
        if bitmap.recording and not bitmap.inconsistent:
            yield (
                f"the dirty bitmap {printable(bitmap.name)} of {plan.device.name} stays with "
                f"{printable(plan.device.chain.active.file)}: whoever makes increments by it has "
                "to begin with a full backup"
            )
    active = plan.device.chain.active
    if active.node.snapshots:
        names = ", ".join(map(printable, active.node.snapshots))
        yield (
            f"the internal snapshots (savevm) {names} of {plan.device.name} stay with "
            f"{printable(active.file)}: the VM cannot load them any more"
        )
