"""BlockGraph: who is stacked on whom inside a running QEMU.

Pure: built from the monitor's replies by `qmpblock.graph.builder`, it asks nothing itself. For
each guest device::

    device -> root node -> filters -> format node -> backing -> backing ...   (the chain)
                                          |             |
                                        storage       storage                 (protocol nodes)
"""

from __future__ import annotations

import posixpath
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from qmpblock.errors import AmbiguousError, NotFoundError, RequestError, printable
from qmpblock.names import is_ours

__all__ = [
    "FILTERS",
    "Bitmap",
    "BlockGraph",
    "Chain",
    "Device",
    "DiskDevice",
    "Edge",
    "JobInfo",
    "Layer",
    "Node",
]

#: Drivers that pass data through unchanged, and the child that they pass it from.
FILTERS: Mapping[str, str] = {
    "blkdebug": "image",
    "blklogwrites": "file",
    "blkreplay": "image",
    "blkverify": "image",
    "commit_top": "backing",
    "compress": "file",
    "copy-before-write": "file",
    "copy-on-read": "file",
    "mirror_top": "backing",
    "preallocate": "file",
    "snapshot-access": "file",
    "throttle": "file",
}


@dataclass(frozen=True)
class Edge:
    """A child of a node: `name` is QEMU's (`file`, `backing`, `data-file`, ...)."""

    name: str
    node: str


@dataclass(frozen=True)
class Bitmap:
    """A named dirty bitmap of a node.

    :ivar granularity: bytes that one bit stands for.
    :ivar recording: whether writes to the node set bits in it.
    :ivar busy: whether a job or an export uses it.
    :ivar inconsistent: whether it was not stored when QEMU last ended; it can only be removed.
    :ivar count: bytes that its set bits stand for, as the guest writes on.
    """

    name: str
    granularity: int
    recording: bool
    persistent: bool
    busy: bool = False
    inconsistent: bool = False
    count: int = field(default=0, compare=False)


@dataclass(frozen=True)
class Node:
    """A vertex of the block graph.

    :ivar size: the virtual size that its parents see, in bytes.
    :ivar filename: as QEMU reports it; may be a `json:` text.
    :ivar backing_filename: what the image's header records, or None.
    :ivar cluster_size: in bytes, or None where the format has none.
    :ivar encrypted: whether the image's data is encrypted.
    :ivar subclusters: whether its clusters are allocated in parts (qcow2's extended_l2).
    :ivar bitmaps: its dirty bitmaps that have a name.
    :ivar detect_zeroes: QEMU's option: `off`, `on` or `unmap`.
    :ivar cache: QEMU's cache options that are on: of `writeback`, `direct`, `no-flush`.
    :ivar write_threshold: the offset at whose crossing QEMU tells of a write; 0: it does not.
    :ivar snapshots: the names of its internal snapshots (savevm, qemu-img snapshot).
    :ivar corrupt: whether QEMU marked the image as corrupt (qcow2).
    :ivar unclean: whether the image says that it was not closed, or is in use (qcow2 with
        lazy refcounts).
    :ivar data_filename: the data file that the image's header records, or None.
    :ivar descriptors: QEMU's own, of the set that its file name `/dev/fdset/N` means.
    """

    name: str
    driver: str
    filename: str
    size: int
    read_only: bool
    backing_filename: str | None = None
    cluster_size: int | None = None
    encrypted: bool = False
    subclusters: bool = False
    children: tuple[Edge, ...] = ()
    bitmaps: tuple[Bitmap, ...] = ()
    detect_zeroes: str = "off"
    cache: frozenset[str] = frozenset()
    write_threshold: int = 0
    snapshots: tuple[str, ...] = ()
    corrupt: bool = False
    unclean: bool = False
    data_filename: str | None = None
    descriptors: tuple[int, ...] = ()

    @property
    def is_filter(self) -> bool:
        """Whether it passes data through unchanged."""
        return self.driver in FILTERS

    def child(self, *names: str) -> str | None:
        """Return the node name of the first child that has one of these edge names."""
        for name in names:
            for edge in self.children:
                if edge.name == name:
                    return edge.node
        return None


@dataclass(frozen=True)
class Layer:
    """One image of a chain.

    :ivar depth: 0 is the active layer (the numbering of `qemu-img map`).
    :ivar node: the format node.
    :ivar storage: the protocol node under it; None where the format node is itself one.
    :ivar data_file: the protocol node of a separate data file, if there is one.
    :ivar between: what lies between the format node and those two: a raw node, a throttle.
    """

    depth: int
    node: Node
    storage: Node | None
    data_file: Node | None = None
    between: tuple[Node, ...] = ()

    def describe(self) -> str:
        """Say which layer of its chain it is, for people."""
        return f"@{self.depth} {printable(self.file)}"

    @property
    def file(self) -> str:
        """The image's file name (or URI), as QEMU has it.

        Options make QEMU describe the format node by a `json:` text; its protocol node then
        has the plain name.
        """
        if self.storage is not None and self.node.filename.startswith("json:"):
            return self.storage.filename
        return self.node.filename

    @property
    def nodes(self) -> tuple[Node, ...]:
        """Every node that is this image and nothing else, the format node first."""
        nodes = (self.node, *self.between, self.storage, self.data_file)
        return tuple(node for node in nodes if node is not None)

    @property
    def format(self) -> str:
        """The name of the format driver."""
        return self.node.driver

    @property
    def size(self) -> int:
        """Virtual size in bytes."""
        return self.node.size


@dataclass(frozen=True)
class Chain:
    """The layers under one root node, the active one first.

    :ivar filters: the filter nodes above the active layer, topmost first.
    :ivar levels: for each node from the active layer down its backing links, filters
        between layers included, the depth of the layer whose data it shows. QEMU's
        allocation depth counts these nodes: depth d names `levels[d - 1]`.
    :ivar level_sizes: the virtual size of each of those nodes, in bytes.
    :ivar veiled: whether a layer is seen through a snapshot-access node: QEMU does not tell
        then which of the layers below supplies what.
    """

    filters: tuple[Node, ...]
    layers: tuple[Layer, ...]
    levels: tuple[int, ...]
    level_sizes: tuple[int, ...]
    veiled: bool = False

    @property
    def active(self) -> Layer:
        """The layer that guest writes land in."""
        return self.layers[0]

    @property
    def root(self) -> Node:
        """The node that the device uses."""
        return self.filters[0] if self.filters else self.active.node

    @property
    def shape(self) -> tuple[object, ...]:
        """What stays the same while guests write: two of one shape are the same chain.

        Protocol nodes grow with every cluster that is allocated, so their sizes do not count.
        """
        nodes = [*self.filters]
        for layer in self.layers:
            nodes += layer.nodes
        return self.levels, self.level_sizes, tuple((node.name, node.driver) for node in nodes)

    def node_names(self) -> frozenset[str]:
        """Every node in it: filters above it, layers, what those lie on."""
        names = {node.name for node in self.filters}
        for layer in self.layers:
            names.update(node.name for node in layer.nodes)
        return frozenset(names)

    def layer(self, text: str) -> Layer:
        """Find one layer by node name, file name or `@N`.

        :raise NotFoundError: none matches.
        :raise AmbiguousError: several do.
        """
        if text.startswith("@"):
            try:
                depth = int(text[1:])
            except ValueError:
                raise RequestError(f"{printable(text)} is not @N with N a depth") from None
            matching = [layer for layer in self.layers if layer.depth == depth]
        else:
            matching = [
                layer
                for layer in self.layers
                if any(node.name == text for node in layer.nodes) or _same_file(text, layer.file)
            ]
        candidates = [f"@{x.depth} {x.node.name} {x.file}" for x in (matching or self.layers)]
        if not matching:
            raise NotFoundError(f"no layer is called {printable(text)}; there are:", candidates)
        if len(matching) > 1:
            raise AmbiguousError(f"{printable(text)} names several layers:", candidates)
        return matching[0]


@dataclass(frozen=True)
class JobInfo:
    """What is told of a background job, with the nodes that it works on where QEMU tells them."""

    id: str
    type: str
    status: str
    current: int = 0
    total: int = 0
    error: str | None = None
    nodes: frozenset[str] = frozenset()

    @property
    def ours(self) -> bool:
        """Whether qmpblock started it: its name says so."""
        return is_ours(self.id)


@dataclass(frozen=True)
class Device:
    """A guest device that holds, or could hold, a disk.

    :ivar id: its qdev id, or None.
    :ivar drive: the id of the legacy -drive, or None.
    :ivar qom_path: of the object that holds the block backend.
    :ivar chain: None when the tray is empty.
    """

    id: str | None
    drive: str | None
    qom_path: str
    removable: bool
    read_only: bool
    chain: Chain | None
    jobs: tuple[JobInfo, ...] = ()
    exports: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """What a person calls it, and DISK accepts: qdev id, drive id or QOM path."""
        return self.id or self.drive or self.qom_path

    def names(self) -> Iterator[str]:
        """Yield every name, except file names, that selects this device."""
        if self.id:
            yield self.id
        if self.drive:
            yield self.drive
        yield self.qom_path
        yield self.qom_path.removesuffix("/virtio-backend")
        if self.chain is not None:
            yield from (node.name for node in self.chain.filters)
            yield from (node.name for node in self.chain.active.nodes)

    def describe(self) -> str:
        """One line for a list of candidates."""
        if self.chain is None:
            return f"{self.name} (empty)"
        active = self.chain.active
        return f"{self.name} (node {active.node.name}, file {active.file})"

    def node_names(self) -> frozenset[str]:
        """Every node in this device's chain: filters above it, layers, what those lie on."""
        return frozenset() if self.chain is None else self.chain.node_names()


@dataclass(frozen=True)
class DiskDevice(Device):
    """A device that holds a disk, so that it has a chain."""

    chain: Chain


@dataclass(frozen=True)
class BlockGraph:
    """All nodes, the guest's devices, and the jobs, of one VM at one moment."""

    nodes: Mapping[str, Node]
    devices: tuple[Device, ...]
    jobs: tuple[JobInfo, ...] = ()
    exports: Mapping[str, str] = field(default_factory=dict)

    def parents(self, name: str) -> tuple[str, ...]:
        """Return the nodes that have this one as a child, sorted."""
        return tuple(sorted(self._parents.get(name, ())))

    @cached_property
    def _parents(self) -> Mapping[str, set[str]]:
        parents: dict[str, set[str]] = {}
        for node in self.nodes.values():
            for edge in node.children:
                parents.setdefault(edge.node, set()).add(node.name)
        return parents

    def users(self, name: str, besides: Collection[str] = ()) -> tuple[str, ...]:
        """Say what uses a node, in words: nodes, devices, exports and jobs; sorted.

        :param besides: nodes that do not count.
        """
        parents = [parent for parent in self.parents(name) if parent not in besides]
        users = [f"node {printable(parent)}" for parent in parents]
        users += [
            f"device {device.describe()}"
            for device in self.disks()
            if device.chain.root.name == name
        ]
        users += [f"export {printable(key)}" for key, node in self.exports.items() if node == name]
        users += [f"job {printable(job.id)}" for job in self.jobs if name in job.nodes]
        return tuple(sorted(users))

    def job(self, name: str) -> JobInfo | None:
        """Return the job of that id, or None."""
        return next((job for job in self.jobs if job.id == name), None)

    def disk_at(self, path: str) -> DiskDevice | None:
        """Return the disk of that QOM path, or None."""
        return next((disk for disk in self.disks() if disk.qom_path == path), None)

    def disks(self) -> tuple[DiskDevice, ...]:
        """Return the devices that hold a disk, in their order."""
        return tuple(one for one in self.devices if isinstance(one, DiskDevice))

    def device(self, text: str, called: Mapping[str, str] | None = None) -> DiskDevice:
        """Find the one device that DISK names (design.md, contracts).

        :param called: the names of disks by a manager's of them, which name them, too.
        :raise NotFoundError: none matches; lists those that there are.
        :raise AmbiguousError: several match; lists them.
        :raise RequestError: it matches a device with an empty tray.
        """
        called = called or {}
        names = {text, called.get(text) or text}
        matching: Sequence[Device] = [
            one for one in self.devices if not names.isdisjoint(one.names())
        ]
        if not matching:
            matching = [
                device for device in self.disks() if _same_file(text, device.chain.active.file)
            ]
        if not matching:
            by_name = {name: called_so for called_so, name in called.items()}
            every = [
                f"{printable(by_name[device.name])}: {device.describe()}"
                if device.name in by_name
                else device.describe()
                for device in self.devices
            ]
            raise NotFoundError(
                f"this VM has no disk called {printable(text)}"
                + ("; it has:" if every else ", nor any other"),
                every,
            )
        if len(matching) > 1:
            raise AmbiguousError(
                f"{printable(text)} names several disks:",
                [device.describe() for device in matching],
                remedy="name one by its device",
            )
        [device] = matching
        if not isinstance(device, DiskDevice):
            raise RequestError(f"{printable(text)} is an empty drive: it holds no disk")
        return device


def _same_file(asked: str, recorded: str) -> bool:
    return asked == recorded or (
        asked.startswith("/")
        and recorded.startswith("/")
        and posixpath.normpath(asked) == posixpath.normpath(recorded)
    )
