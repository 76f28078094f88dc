"""Who else uses a layer: what a commit or stream would change or take from under them. Pure.

A commit of `top` into `base` writes to the base. So whoever reads the base, or a layer between
the two, sees other content from then on, and no point in time meanwhile; QEMU lets a backup read
on through its export and get nonsense (measured on 7.2.22 and 11.1.2, NBD and vhost-user-blk)::

    active   reads as before: an export of it follows the guest
    top      reads as before: what it does not hold itself lies below it
    between  reads what came into the base from above       } nobody else may
    base     is written to, and so is its file              } read these
    below    reads as before

A stream changes what no layer reads, only the file that it writes to; an export keeps a layer
that leaves the chain open. Other disks and other overlays are more than readers: they would be
changed for good, and no layer of theirs may go.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from qmpblock.errors import BusyError, InUseError, printable
from qmpblock.graph.model import BlockGraph, Device, Layer, Node
from qmpblock.names import is_ours

__all__ = ["Use", "check_bitmaps", "check_readers", "may_go", "overlays_of", "readers_of"]


@dataclass(frozen=True)
class Use:
    """Somebody's use of a layer.

    :ivar what: in words, as in `the export theirs`.
    :ivar remedy: how to end it.
    """

    what: str
    remedy: str


def overlays_of(graph: BlockGraph, device: Device, layer: Layer) -> Iterator[Use]:
    """Yield the nodes, filters apart, that lie on a layer and are none of its own disk."""
    for node in _above(graph, device, layer.nodes):
        if not graph.nodes[node].is_filter:
            yield _node(node)


def readers_of(graph: BlockGraph, device: Device, nodes: Iterable[Node]) -> Iterator[Use]:
    """Yield who else reads some nodes of a layer, directly or through nodes not of its own disk.

    Exports of our own are left out: a map is taken again where the chain has changed.
    """
    nodes = tuple(nodes)
    above = sorted(_above(graph, device, nodes))
    reached = {node.name for node in nodes}.union(above)
    for export, node in graph.exports.items():
        if node in reached and not is_ours(export):
            yield Use(
                f"the export {printable(export)}",
                "wait until whoever reads it is done; if nobody does: block-export-del",
            )
    for job in graph.jobs:
        if job.nodes & reached and not job.ours:
            yield Use(
                f"the job {printable(job.id)} ({printable(job.type)})",
                "wait for its end, or have whoever started it end it",
            )
    for name in above:
        if not graph.nodes[name].is_filter:
            yield _node(name)


def check_readers(
    graph: BlockGraph,
    device: Device,
    operation: str,
    top: str,
    base: str,
    *,
    standing: str | None = None,
) -> None:
    """Refuse to change what somebody else reads.

    :param operation: `commit` or `stream`.
    :param top: the node of that layer; also `base`. Where the disk has them no more there is
        nothing to refuse.
    :param standing: what stands, before anything is touched; None at the end of a job.
    :raise BusyError: somebody does; names the first. Before anything is touched, an InUseError.
    """
    layers = () if device.chain is None else device.chain.layers
    depths = {layer.node.name: layer.depth for layer in layers}
    if top not in depths or (operation == "commit" and base not in depths):
        return
    if operation == "commit":
        last = layers[depths[base]]
        changed = [(layer, layer.nodes[:1]) for layer in layers[depths[top] + 1 : last.depth]]
        changed.append((last, last.nodes))
    else:
        into = layers[depths[top]]
        # The guest writes to the file of the active one all the time.
        changed = [(into, into.nodes[1:])] if into.depth else []
    for layer, nodes in changed:
        for use in readers_of(graph, device, nodes):
            raise _in_use(standing)(
                f"@{layer.depth} {printable(layer.file)} is read by {use.what} too, which would "
                "see it change, and no point in time",
                standing=standing,
                remedy=use.remedy,
            )


def check_bitmaps(graph: BlockGraph, nodes: Iterable[str], *, standing: str | None = None) -> None:
    """Refuse to let a node go while somebody uses a dirty bitmap of it: QEMU would abort.

    `bdrv_release_dirty_bitmap_locked: Assertion '!bdrv_dirty_bitmap_busy(bitmap)' failed` at the
    end of a stream, of a commit of middle layers and, by blockdev-del, of an active commit
    (7.2.22 and 11.1.2, each time).

    :param nodes: that are to go; those that are not there any more do not count.
    :param standing: as for `check_readers`.
    :raise BusyError: somebody does; before anything is touched, an InUseError.
    """
    for name in nodes:
        if bitmap := _busy(graph, name):
            raise _in_use(standing)(
                f"the dirty bitmap {printable(bitmap)} of {printable(name)} is in use (an export "
                "of a backup, say); QEMU aborts when that layer goes",
                standing=standing,
                remedy="wait for whoever uses it",
            )


def may_go(graph: BlockGraph, name: str, going: Collection[str] = ()) -> bool:
    """Whether a node can be deleted: nothing uses it, nor a dirty bitmap of it.

    :param going: nodes that go before it.
    """
    return not graph.users(name, besides=going) and not _busy(graph, name)


def _in_use(standing: str | None) -> type[BusyError]:
    """Return what is raised: at the end of a job it is no refusal any more."""
    return BusyError if standing is None else InUseError


def _busy(graph: BlockGraph, name: str) -> str | None:
    node = graph.nodes.get(name)
    return next((one.name for one in node.bitmaps if one.busy), None) if node else None


def _node(name: str) -> Use:
    return Use(f"the node {printable(name)}", "remove that node, if nobody needs it: blockdev-del")


def _above(graph: BlockGraph, device: Device, nodes: Iterable[Node]) -> Iterator[str]:
    """Yield every node that lies on some others, but for the disk's own layers and filters."""
    own = device.node_names()
    todo, seen = [node.name for node in nodes], set(own)
    while todo:
        for parent in graph.parents(todo.pop()):
            if parent not in seen:
                seen.add(parent)
                todo.append(parent)
                yield parent
