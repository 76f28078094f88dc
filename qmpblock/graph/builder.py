"""A BlockGraph from a monitor's replies.

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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from qmpblock.errors import GraphError, printable
from qmpblock.graph.model import (
    FILTERS,
    Bitmap,
    BlockGraph,
    Chain,
    Device,
    DiskDevice,
    Edge,
    JobInfo,
    Layer,
    Node,
)
from qmpblock.names import is_ours

__all__ = ["Replies", "build"]

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
            str(fdset["fdset-id"]): tuple(_number(one["fd"]) for one in _records(fdset["fds"]))
            for fdset in _records(list(self.replies.fdsets))
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
        for name, children in edges.items():
            if name in self.infos and not self._has_children(name):
                self.edges[name] = tuple(children)
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
                    count=_number(bitmap.get("count", 0)),
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
        empty = Device(
            id=path.removeprefix(_PERIPHERAL).split("/")[0]
            if path.startswith(_PERIPHERAL)
            else None,
            drive=str(info.get("device") or "") or None,
            qom_path=path,
            removable=info.get("removable") is True,
            read_only=inserted is not None and _mapping(inserted).get("ro") is True,
            chain=None,
        )
        if inserted is None:
            return empty
        shown = _text(_mapping(inserted), "node-name")
        if shown not in self.seen:
            chain = self._chain(self._topmost(shown))
            names = chain.node_names()
            numbers = {number for name in names for number in self.jobs_at.get(name, ())}
            works = tuple(jobs[number] for number in sorted(numbers))
            exports = tuple(sorted(one for name in names for one in self.exports_at.get(name, ())))
            self.seen[shown] = chain, works, exports
        return DiskDevice(
            empty.id,
            empty.drive,
            empty.qom_path,
            empty.removable,
            empty.read_only,
            *self.seen[shown],
        )

    def _topmost(self, name: str) -> str:
        """Climb from the node that query-block shows to the one that the device really has."""
        seen = {name}
        while True:
            above = [
                parent
                for parent in self.parents.get(name, ())
                if self.nodes[parent].driver in _JOB_FILTERS
                and not is_ours(parent)  # ours are beside the stack, not in it
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
        below: dict[str, Node] = {}
        while name is not None:
            if name in below:
                raise GraphError(f"the block graph has a cycle at {printable(name)}")
            if len(below) == _MOST_BELOW:
                raise GraphError(f"more than {_MOST_BELOW} nodes lie below {printable(name)}")
            node = below[name] = self._known(name)
            name = node.child(FILTERS.get(node.driver, "file"), "file")
        return list(below.values())

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
