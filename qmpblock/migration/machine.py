"""What one VM is, so far as the guest in it or a migration of it can tell. Pure.

`qmpblock.migration.look` reads it, `qmpblock.migration.compare` holds two against each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from qmpblock.errors import printable
from qmpblock.graph.model import Bitmap
from qmpblock.migration.devicetree import GuestDevice

__all__ = ["WITH_BITMAPS", "Block", "FileIdentity", "GuestDisk", "LowerLayer", "Machine"]

WITH_BITMAPS = ("qcow2",)
"""Formats that store dirty bitmaps."""


@dataclass(frozen=True)
class Block:
    """One block of memory, as a migration sends it. All in bytes.

    :ivar used: how much there is.
    :ivar largest: how much there may be, where it can grow; `used` where it cannot.
    """

    used: int
    largest: int


FileIdentity = tuple[int, int | None]
"""Device and inode of a file on this host; of a block device its number, and None."""


@dataclass(frozen=True)
class LowerLayer:
    """An image that a disk's active layer lies on.

    :ivar size: its virtual size, in bytes.
    :ivar files: that it is in, its data file included; None where one cannot be told.
    :ivar part: which part of its file it is (offset and size, in bytes); None where it is all.
    """

    file: str
    format: str
    size: int
    files: tuple[FileIdentity, ...] | None = None
    part: tuple[int, int | None] | None = None


@dataclass(frozen=True)
class GuestDisk:
    """A disk of the guest's, or a drive without one.

    :ivar place: of its device (`GuestDevice.place`); empty where that is not known.
    :ivar name: what a person calls it.
    :ivar path: of its device in QEMU's object tree, which may be another one in another QEMU.
    :ivar size: in bytes; None where the tray is empty.
    :ivar file: of its active layer.
    :ivar here: a name that leads to it on this host; empty where there is none.
    :ivar identity: what that file is on this host; None where that cannot be told.
    :ivar bitmaps: dirty bitmaps of its active layer, those with a name; `lower`: of what else it
        is made of.
    :ivar stored: names of those that the image itself has.
    :ivar keeps_bitmaps: whether the active layer's format can store them.
    :ivar snapshots: names of the internal snapshots (savevm) of its active layer.
    :ivar holes: whether what is discarded in it is given back; None where nothing tells.
    :ivar iothread: in which it runs; None: in none.
    :ivar jobs: that run on it.
    :ivar below: what the active layer lies on, from the top.
    :ivar taken: bytes of host space that the image takes, as QEMU says; None where it does not.
    :ivar zeroes: what becomes of zeros that are written to it (`detect-zeroes`).
    :ivar names_backing: whether the active layer's header says on which image it lies.
    """

    place: str
    name: str
    size: int | None
    path: str = ""
    read_only: bool = False
    format: str = ""
    file: str = ""
    here: str = ""
    identity: FileIdentity | None = None
    encrypted: bool = False
    bitmaps: tuple[Bitmap, ...] = ()
    lower: tuple[Bitmap, ...] = ()
    stored: frozenset[str] = frozenset()
    keeps_bitmaps: bool = False
    snapshots: tuple[str, ...] = ()
    holes: bool | None = None
    iothread: str | None = None
    jobs: tuple[str, ...] = ()
    below: tuple[LowerLayer, ...] = ()
    names_backing: bool = False
    taken: int | None = None
    zeroes: str = "off"

    @property
    def on_device(self) -> bool:
        """Whether its image is on a block device, as far as that can be told."""
        return self.identity is not None and self.identity[1] is None

    def describe(self) -> str:
        """Say which it is, for people."""
        return (
            printable(self.name)
            if not self.file
            else f"{printable(self.name)} (" + (f"{printable(self.file)})")
        )


@dataclass(frozen=True)
class Machine:
    """One VM.

    :ivar version: of its QEMU.
    :ivar type: of the machine, as the migration stream names it.
    :ivar types: that this QEMU knows, where that was asked.
    :ivar options: of the machine, that the guest can tell.
    :ivar memory: at the start, in bytes; `plugged`: that came later.
    :ivar blocks: of memory, by name.
    :ivar cpu: the type of its CPUs; `features`: what the guest finds of them, by name.
    :ivar cpus: where there are CPUs now.
    :ivar devices: as the guest finds them.
    :ivar capabilities: of migration: those it knows, and whether each is on.
    :ivar status: of query-status.
    :ivar elsewhere: why its images are not its own, in words; empty where they are.
    :ivar listens: whether it has begun to wait for a migration at some address.
    :ivar blocked: why QEMU migrates it not, in QEMU's words.
    :ivar paused: whether it was told not to run by itself once it has arrived (-S); None where
        nothing tells.
    """

    version: tuple[int, int, int]
    type: str
    types: frozenset[str] = frozenset()
    options: Mapping[str, str] = field(default_factory=dict)
    uuid: str = ""
    memory: int = 0
    plugged: int = 0
    blocks: Mapping[str, Block] = field(default_factory=dict)
    cpu: str = ""
    features: Mapping[str, str] = field(default_factory=dict)
    cpus: frozenset[str] = frozenset()
    devices: tuple[GuestDevice, ...] = ()
    disks: tuple[GuestDisk, ...] = ()
    capabilities: Mapping[str, bool] = field(default_factory=dict)
    status: str = ""
    elsewhere: str = ""
    listens: bool = False
    blocked: tuple[str, ...] = ()
    paused: bool | None = None

    @property
    def qemu(self) -> str:
        """The version of its QEMU, for people."""
        return "QEMU " + ".".join(map(str, self.version))
