"""BlockGraph: who is stacked on whom inside a running QEMU.

Pure: built from the monitor's replies, it asks nothing itself. For each guest device::

    device -> root node -> filters -> format node -> backing -> backing ...   (the chain)
                                          |             |
                                        storage       storage                 (protocol nodes)

Where the edges come from (F8):

- QEMU 10.1 and newer: `children` in query-named-block-nodes;
- older: query-blockstats, whose nested `parent` (the file child) and `backing` name nodes;
  it leaves out the filters that jobs put on top, and calls a data file the file child;
- x-debug-query-block-graph, where there is one, names what blockstats leaves out, and is
  the only reply that tells which nodes a job works on.

The nested form of query-named-block-nodes is never used: 14 s at 150 layers.

A monitor may describe a graph that no QEMU has, or that takes for ever to walk: the numbers of
nodes, users and steps are bounded, and all of it takes time in proportion to them.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

from qmpblock.errors import AmbiguousError, GraphError, NotFoundError, RequestError, printable

__all__ = [
    "FILTERS",
    "Bitmap",
    "BlockGraph",
    "Chain",
    "Device",
    "Edge",
    "JobInfo",
    "Layer",
    "Node",
    "Replies",
    "build",
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
# What jobs insert above the node they work on, unseen by query-block.
_JOB_FILTERS = frozenset({"commit_top", "copy-before-write", "copy-on-read", "mirror_top"})
_PERIPHERAL = "/machine/peripheral/"

_MOST_NODES = 20_000  # a monitor's message has room for 16,000 such as QEMU describes
_MOST_USERS = 4_000  # devices, jobs and exports, of each
_MOST_CHILDREN = 256  # of one node; a quorum has the most
_LARGEST_CLUSTER = 256 << 20  # bytes: a block of VHDX; no format that grows has larger ones
_MOST_BELOW = 64  # a format node, with no format node between; of two is known
_MOST_STEPS = 200_000  # from node to node, along all chains; 500 chains of 150 layers take 150,000


@dataclass(frozen=True)
class Replies:
    """What `BlockGraph` is built from: one monitor's replies, as they came.

    :ivar debug_graph: of x-debug-query-block-graph, or None where QEMU has none.
    :ivar fdsets: of query-fdsets; asked where a node's file name says that it is in one.
    """

    block: Any
    nodes: Any
    stats: Any
    jobs: Any
    exports: Any
    debug_graph: Any = None
    fdsets: Any = ()


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
    """

    name: str
    granularity: int
    recording: bool
    persistent: bool
    busy: bool = False
    inconsistent: bool = False


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
        found = (self.node, *self.between, self.storage, self.data_file)
        return tuple(node for node in found if node is not None)

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
            found = [layer for layer in self.layers if layer.depth == depth]
        else:
            found = [
                layer
                for layer in self.layers
                if any(node.name == text for node in layer.nodes) or _same_file(text, layer.file)
            ]
        candidates = [f"@{x.depth} {x.node.name} {x.file}" for x in (found or self.layers)]
        if not found:
            raise NotFoundError(f"no layer is called {printable(text)}; there are:", candidates)
        if len(found) > 1:
            raise AmbiguousError(f"{printable(text)} names several layers:", candidates)
        return found[0]


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
        return self.id.startswith("qmpblock-")


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
        found: dict[str, set[str]] = {}
        for node in self.nodes.values():
            for edge in node.children:
                found.setdefault(edge.node, set()).add(node.name)
        return found

    def users(self, name: str) -> tuple[str, ...]:
        """Say what uses a node, in words: nodes, devices, exports and jobs; sorted."""
        found = [f"node {printable(parent)}" for parent in self.parents(name)]
        found += [
            f"device {device.describe()}"
            for device in self.devices
            if device.chain is not None and device.chain.root.name == name
        ]
        found += [f"export {printable(key)}" for key, node in self.exports.items() if node == name]
        found += [f"job {printable(job.id)}" for job in self.jobs if name in job.nodes]
        return tuple(sorted(found))

    def job(self, name: str) -> JobInfo | None:
        """Return the job of that id, or None."""
        return next((job for job in self.jobs if job.id == name), None)

    def device(self, text: str) -> Device:
        """Find the one device that DISK names (design.md, contracts).

        :raise NotFoundError: none matches; lists those that there are.
        :raise AmbiguousError: several match; lists them.
        :raise RequestError: it matches a device with an empty tray.
        """
        found = [device for device in self.devices if text in device.names()]
        if not found:
            found = [
                device
                for device in self.devices
                if device.chain is not None and _same_file(text, device.chain.active.file)
            ]
        if not found:
            every = [device.describe() for device in self.devices]
            raise NotFoundError(
                f"this VM has no disk called {printable(text)}"
                + ("; it has:" if every else ", nor any other"),
                every,
            )
        if len(found) > 1:
            raise AmbiguousError(
                f"{printable(text)} names several disks:",
                [device.describe() for device in found],
                remedy="name one by its device",
            )
        if found[0].chain is None:
            raise RequestError(f"{printable(text)} is an empty drive: it holds no disk")
        return found[0]


def _same_file(asked: str, recorded: str) -> bool:
    return asked == recorded or (
        asked.startswith("/")
        and recorded.startswith("/")
        and posixpath.normpath(asked) == posixpath.normpath(recorded)
    )


def build(replies: Replies) -> BlockGraph:
    """Build the graph.

    :raise GraphError: the replies are malformed, or do not fit together (the graph may have
        changed between two of them: ask again).
    """
    try:
        return _Builder(replies).build()
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise GraphError(
            f"QEMU's description of its block graph makes no sense: {printable(repr(error))}"
        ) from error


class _Builder:
    """The state while a graph is built; its methods are steps of `build`."""

    def __init__(self, replies: Replies) -> None:
        self.replies = replies
        self.steps = 0
        # By the node that query-block shows: its chain, and the jobs and exports of that.
        self.seen: dict[str, tuple[Chain, tuple[JobInfo, ...], tuple[str, ...]]] = {}
        self.infos: dict[str, Mapping[str, Any]] = {}
        for info in _records(replies.nodes, _MOST_NODES):
            name = _text(info, "node-name")
            if name in self.infos:
                raise GraphError(f"QEMU lists the node {printable(name)} twice")
            self.infos[name] = info
        self.edges: dict[str, tuple[Edge, ...]] = {}
        self.job_nodes: dict[str, frozenset[str]] = {}

    def build(self) -> BlockGraph:
        self.fdsets = {
            str(found["fdset-id"]): tuple(_number(one["fd"]) for one in _records(found["fds"]))
            for found in _records(list(self.replies.fdsets))
        }
        self._collect_edges()
        self.nodes = {name: self._node(name, info) for name, info in self.infos.items()}
        self.parents: dict[str, list[str]] = {}
        for node in self.nodes.values():
            for edge in node.children:
                self.parents.setdefault(edge.node, []).append(node.name)
        jobs = tuple(self._job(job) for job in _records(self.replies.jobs, _MOST_USERS))
        exports = {
            _text(export, "id"): _text(export, "node-name")
            for export in _records(self.replies.exports, _MOST_USERS)
        }
        self.jobs_at: dict[str, list[int]] = {}
        for number, job in enumerate(jobs):
            for name in job.nodes:
                self.jobs_at.setdefault(name, []).append(number)
        self.exports_at: dict[str, list[str]] = {}
        for export, exported in exports.items():
            self.exports_at.setdefault(exported, []).append(export)
        devices = []
        for info in _records(self.replies.block, _MOST_USERS):
            if isinstance(info.get("qdev"), str):
                devices.append(self._device(info, jobs))
        return BlockGraph(self.nodes, tuple(devices), jobs, exports)

    # edges

    def _collect_edges(self) -> None:
        if all("children" in info for info in self.infos.values()):
            for name, info in self.infos.items():
                self.edges[name] = tuple(
                    Edge(_text(child, "child"), _text(child, "node-name"))
                    for child in _records(info["children"])
                    if "node-name" in child
                )
        else:
            self._edges_from_stats()
        self._edges_from_debug_graph()

    def _edges_from_stats(self) -> None:
        # Not recursive: a peer decides how deep this is nested. Shared parts of the tree
        # come once per path to them, twice for each filter above: skip what is known.
        todo = list(_records(self.replies.stats))
        while todo:
            stat = todo.pop()
            name = stat.get("node-name")
            file, backing = stat.get("parent"), stat.get("backing")
            if name in self.edges:
                continue
            if isinstance(name, str):
                edges = []
                driver = str(self.infos[name]["drv"]) if name in self.infos else ""
                if driver in FILTERS:
                    # `parent` and `backing` both hold the one child of a filter.
                    only = _mapping(file if file is not None else backing)
                    edges.append(Edge(FILTERS[driver], _text(only, "node-name")))
                else:
                    for label, child in (("file", file), ("backing", backing)):
                        if child is not None:
                            edges.append(Edge(label, _text(_mapping(child), "node-name")))
                self.edges[name] = tuple(edges)
            todo += [_mapping(child) for child in (file, backing) if child is not None]

    def _edges_from_debug_graph(self) -> None:
        if self.replies.debug_graph is None:
            return
        graph = _mapping(self.replies.debug_graph)
        vertices = {_number(v["id"]): v for v in _records(graph["nodes"])}
        edges: dict[str, list[Edge]] = {}
        job_nodes: dict[str, set[str]] = {}
        for edge in _records(graph["edges"]):
            parent, child = vertices[_number(edge["parent"])], vertices[_number(edge["child"])]
            if child.get("type") != "block-driver":
                continue
            target = _text(child, "name")
            if parent.get("type") == "block-job":
                job_nodes.setdefault(_text(parent, "name"), set()).add(target)
            elif parent.get("type") == "block-driver":
                edges.setdefault(_text(parent, "name"), []).append(
                    Edge(_text(edge, "name"), target)
                )
        for name, found in edges.items():
            if name in self.infos and not self._has_children(name):
                self.edges[name] = tuple(found)
        self.job_nodes = {job: frozenset(nodes) for job, nodes in job_nodes.items()}

    def _has_children(self, name: str) -> bool:
        return "children" in self.infos[name]

    # vertices

    def _node(self, name: str, info: Mapping[str, Any]) -> Node:
        image = _mapping(info["image"])
        size = image["virtual-size"]
        if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size < 1 << 63:
            raise GraphError(f"node {printable(name)} has the size {printable(size)}")
        children = self.edges.get(name, ())
        if len(children) > _MOST_CHILDREN:
            raise GraphError(f"node {printable(name)} has {len(children)} children")
        for edge in children:
            if edge.node not in self.infos:
                raise GraphError(
                    f"node {printable(name)} has the child {printable(edge.node)}, "
                    "which QEMU does not list",
                    remedy="the graph changed while it was read; try again",
                )
        backing = image.get("backing-filename")
        cluster = image.get("cluster-size")
        if not isinstance(cluster, int) or not 0 < cluster <= _LARGEST_CLUSTER:
            cluster = None
        data = _format_data(image).get("data-file")
        return Node(
            name=name,
            driver=_text(info, "drv"),
            filename=_text(info, "file"),
            size=size,
            read_only=info.get("ro") is True,
            backing_filename=backing if isinstance(backing, str) else None,
            cluster_size=cluster,
            encrypted=info.get("encrypted") is True or image.get("encrypted") is True,
            subclusters=_format_data(image).get("extended-l2") is True,
            children=children,
            bitmaps=tuple(
                Bitmap(
                    name=bitmap["name"],
                    granularity=_number(bitmap["granularity"]),
                    recording=bitmap.get("recording") is True,
                    persistent=bitmap.get("persistent") is True,
                    busy=bitmap.get("busy") is True,
                    inconsistent=bitmap.get("inconsistent") is True,
                )
                for bitmap in _records(info.get("dirty-bitmaps", []))
                if isinstance(bitmap.get("name"), str)  # those of jobs have none
            ),
            detect_zeroes=printable(info.get("detect_zeroes", "off")),
            cache=frozenset(
                key for key, on in _mapping(info.get("cache", {})).items() if on is True
            ),
            write_threshold=_number(info.get("write_threshold", 0)),
            snapshots=tuple(
                str(one.get("name") or one.get("id", ""))
                for one in _records(image.get("snapshots", []))
            ),
            corrupt=_format_data(image).get("corrupt") is True,
            unclean=image.get("dirty-flag") is True,
            data_filename=data if isinstance(data, str) else None,
            descriptors=self.fdsets.get(_text(info, "file").removeprefix("/dev/fdset/"), ()),
        )

    def _job(self, info: Mapping[str, Any]) -> JobInfo:
        job_id = _text(info, "id")
        error = info.get("error")
        return JobInfo(
            id=job_id,
            type=_text(info, "type"),
            status=_text(info, "status"),
            current=_number(info.get("current-progress", 0)),
            total=_number(info.get("total-progress", 0)),
            error=None if error is None else str(error),
            nodes=self.job_nodes.get(job_id, frozenset()),
        )

    def _device(self, info: Mapping[str, Any], jobs: Sequence[JobInfo]) -> Device:
        qdev = _text(info, "qdev")
        path = qdev if qdev.startswith("/") else _PERIPHERAL + qdev
        inserted = info.get("inserted")
        shown = None if inserted is None else _text(_mapping(inserted), "node-name")
        chain: Chain | None = None
        works: tuple[JobInfo, ...] = ()
        exports: tuple[str, ...] = ()
        if shown is not None and shown in self.seen:
            chain, works, exports = self.seen[shown]
        elif shown is not None:
            chain = self._chain(self._topmost(shown))
            names = chain.node_names()
            numbers = {number for name in names for number in self.jobs_at.get(name, ())}
            works = tuple(jobs[number] for number in sorted(numbers))
            exports = tuple(sorted(one for name in names for one in self.exports_at.get(name, ())))
            self.seen[shown] = chain, works, exports
        return Device(
            id=path.removeprefix(_PERIPHERAL).split("/")[0]
            if path.startswith(_PERIPHERAL)
            else None,
            drive=str(info.get("device") or "") or None,
            qom_path=path,
            removable=info.get("removable") is True,
            read_only=inserted is not None and _mapping(inserted).get("ro") is True,
            chain=chain,
            jobs=works,
            exports=exports,
        )

    def _topmost(self, name: str) -> str:
        """Climb from the node that query-block shows to the one that the device really has."""
        seen = {name}
        while True:
            above = [
                parent
                for parent in self.parents.get(name, ())
                if self.nodes[parent].driver in _JOB_FILTERS
                and not parent.startswith("qmpblock-")  # ours are beside the stack, not in it
                and self.nodes[parent].child(FILTERS[self.nodes[parent].driver]) == name
            ]
            if len(above) != 1 or above[0] in seen:
                return name
            name = above[0]
            seen.add(name)

    def _chain(self, root: str) -> Chain:
        filters: list[Node] = []
        layers: list[Layer] = []
        levels: list[tuple[int, int]] = []
        seen: set[str] = set()
        veiled = False
        name: str | None = root
        while name is not None:
            if name in seen:
                raise GraphError(f"the block graph has a cycle at {printable(name)}")
            seen.add(name)
            node = self._known(name)
            if node.is_filter:
                if layers:
                    veiled = veiled or node.driver == "snapshot-access"
                    levels.append((len(layers), node.size))
                else:
                    filters.append(node)
                name = node.child(FILTERS[node.driver], "file", "backing", "image")
                if name is None:
                    raise GraphError(f"the filter node {printable(node.name)} has no child")
                continue
            levels.append((len(layers), node.size))
            file = self._column(node.child("file", "data-file"))
            data = self._column(node.child("data-file"))
            layers.append(
                Layer(
                    depth=len(layers),
                    node=node,
                    storage=file[-1] if file else None,
                    data_file=data[-1] if data else None,
                    between=tuple(dict.fromkeys(file[:-1] + data[:-1])),
                )
            )
            name = node.child("backing")
        return Chain(
            tuple(filters),
            tuple(layers),
            tuple(depth for depth, _ in levels),
            tuple(size for _, size in levels),
            veiled,
        )

    def _column(self, name: str | None) -> list[Node]:
        """Return what lies below a `file` edge, down to the protocol node at its end."""
        found: dict[str, Node] = {}
        while name is not None:
            if name in found:
                raise GraphError(f"the block graph has a cycle at {printable(name)}")
            if len(found) == _MOST_BELOW:
                raise GraphError(f"more than {_MOST_BELOW} nodes lie below {printable(name)}")
            node = found[name] = self._known(name)
            name = node.child(FILTERS.get(node.driver, "file"), "file")
        return list(found.values())

    def _known(self, name: str) -> Node:
        self.steps += 1
        if self.steps > _MOST_STEPS:
            raise GraphError(f"all chains together have more than {_MOST_STEPS} nodes")
        if name not in self.nodes:
            raise GraphError(
                f"QEMU names the node {printable(name)} but does not list it",
                remedy="the graph changed while it was read; try again",
            )
        return self.nodes[name]


def _records(reply: Any, most: int | None = None) -> Sequence[Mapping[str, Any]]:
    if not isinstance(reply, list):
        raise GraphError(f"QEMU sent {printable(type(reply).__name__)} where a list belongs")
    if most is not None and len(reply) > most:
        raise GraphError(f"QEMU sent {len(reply)} where there can be {most} at the most")
    return [_mapping(item) for item in reply]


def _mapping(item: Any) -> Mapping[str, Any]:
    if not isinstance(item, dict):
        raise GraphError(f"QEMU sent {printable(type(item).__name__)} where an object belongs")
    return cast("Mapping[str, Any]", item)


def _format_data(image: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what only an image of this format has."""
    return _mapping(_mapping(image.get("format-specific", {})).get("data", {}))


def _text(item: Mapping[str, Any], key: str) -> str:
    value = item[key]
    if not isinstance(value, str):
        raise GraphError(f"QEMU sent {printable(repr(value))} as {key}")
    return value


def _number(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 64:
        raise GraphError(f"QEMU sent {printable(repr(value), 60)} where a number belongs")
    return value
