"""What is left to do of a change whose controller gave up or died. Pure.

The plan follows from the change's record, what its journal adds, and the block graph with
its jobs as they are now; nothing is remembered, so it can be made anew after every step, by
anybody, however often: `steps` of a VM in which nothing is left are none.

A job is dealt with first, and alone, because its end changes the graph::

    created .. standby   undo: cancel          continue: follow
    waiting, aborting    wait
    pending              a pivot: mark, finalize at once (it holds the guest's I/O, K5)
                         else undo: cancel     continue: flush (K6), finalize
    concluded            dismiss

Then what is left over is removed: nodes and files that we made and nothing uses, the nodes
of layers that left the chain, dirty bitmaps whose commit did not happen.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from qmpblock.changes.record import Record
from qmpblock.errors import printable
from qmpblock.graph.layeruse import may_go
from qmpblock.graph.model import BlockGraph, JobInfo
from qmpblock.qemu.jobstate import ACTIVE

__all__ = ["Choice", "Step", "steps", "took_effect"]


class Choice(Enum):
    """What is wanted of a change that is not finished."""

    UNDO = "undo"
    CONTINUE = "continue"


@dataclass(frozen=True)
class Step:
    """One thing to do, and why, in words.

    :ivar verb: `follow`, `cancel`, `wait`, `pivot`, `finalize`, `dismiss`, `relink`,
        `restore-zeroes`, `restore-discard`, `bring-home`, `restore-limits`, `delete-bitmap`,
        `delete-node` or `delete-file`.
    :ivar what: the job, node (for a bitmap NODE/NAME) or file.
    """

    verb: str
    what: str
    why: str

    def __str__(self) -> str:
        return f"{self.verb} {printable(self.what)}: {self.why}"


def took_effect(record: Record, graph: BlockGraph) -> bool | None:
    """Whether the change is done, as far as the guest and the chain go; None: cannot tell.

    It cannot be told of a disk that was unplugged around a pivot.
    """
    if record.operation == "snapshot":
        # One transaction: all overlays lie on their images, or none does.
        return any(node in graph.nodes and _lies_on_something(graph, node) for node in record.nodes)
    if record.pivot:
        for device in graph.devices:
            if device.chain is not None and device.qom_path in record.devices:
                layers = [layer.node.name for layer in device.chain.layers]
                return record.top not in layers and record.base in layers
        return None
    keeper = graph.nodes.get(record.keeper)
    if keeper is None:
        return None
    return (_below(graph, record.keeper) or "") == record.base


def steps(
    record: Record,
    graph: BlockGraph,
    choice: Choice,
    made: Iterable[str] = (),
    *,
    stale: bool | None = None,
) -> tuple[Step, ...]:
    """Return what is to be done next; nothing where nothing is left.

    :param made: image files that the journal says the change made itself.
    :param stale: whether the journal says that the overlay of a pivot is stale; None: there
        is no journal.
    """
    for name in (record.job, *record.helpers):
        job = graph.job(name)
        if job is not None:
            # What only prepares is never carried on.
            step = _of_job(record, job, choice if name == record.job else Choice.UNDO)
            # While the job runs its base is writable, and lets persistent bitmaps go.
            bitmaps = _bitmaps(graph, record.bitmaps) if step.verb == "cancel" else []
            return (*bitmaps, step)
    if _is_out(record, graph, stale):
        return tuple(_way_home(record, graph))
    return tuple(_leftovers(record, graph, made, stale=stale))


def _is_out(record: Record, graph: BlockGraph, stale: bool | None) -> bool:
    """Whether an overlay of ours holds the guest's newest data: a staged commit was broken off.

    Where its disk was unplugged, only the journal tells; without one it is left alone.
    """
    if record.operation != "allocate" or record.top not in graph.nodes:
        return False
    active = _active_nodes(record, graph)
    if active:
        return record.top in active
    return stale is False and _lies_on_something(graph, record.top)


def _way_home(record: Record, graph: BlockGraph) -> Iterable[Step]:
    """Bring it home without the zeros that were to get there first: there may be no room."""
    yield from _without_zeros(record, graph)
    yield from _zeroes(record, graph)
    yield Step("bring-home", record.top, "it holds what the guest wrote last")


def _without_zeros(record: Record, graph: BlockGraph) -> Iterable[Step]:
    """Have an overlay of ours lie on its image itself, and remove what brought zeros there.

    While that lies on the image, the image cannot be written to by anybody else; and while it
    may write there, nobody may lie on the image who has to see it as it was.
    """
    overlay = graph.nodes.get(record.top)
    between = overlay.child("backing") if overlay is not None else None
    gone: set[str] = set()
    for node in record.nodes:  # each before those that it lies on
        if node == between:
            yield Step("relink", record.top, "it is to lie on the image itself again")
            gone.add(f"node {record.top}")
        if node in graph.nodes and node != record.top and gone.issuperset(graph.users(node)):
            gone.add(f"node {node}")
            yield Step("delete-node", node, "it served to bring zeros there, and holds none")


def _below(graph: BlockGraph, node: str) -> str | None:
    """Return the node that an image lies on, filters left out."""
    below = graph.nodes[node].child("backing")
    while below is not None and graph.nodes[below].is_filter:
        below = graph.nodes[below].child("file", "backing", "image")
    return below


def _active_nodes(record: Record, graph: BlockGraph) -> set[str]:
    return {
        device.chain.active.node.name
        for device in graph.devices
        if device.chain is not None and device.qom_path in record.devices
    }


def _of_job(record: Record, job: JobInfo, choice: Choice) -> Step:
    if job.status == "concluded":
        verdict = "with success" if job.error is None else f"with {printable(job.error)!r}"
        return Step("dismiss", job.id, f"it has ended, {verdict}")
    if job.status == "pending" and record.pivot and job.id == record.job:
        return Step("pivot", job.id, "it holds the guest's I/O until it is finalized")
    if record.operation == "allocate" and job.id == record.job and job.status in ACTIVE:
        return Step("bring-home", record.top, "it holds what the guest wrote last")
    if choice is Choice.UNDO and (job.status in ACTIVE or job.status == "pending"):
        return Step("cancel", job.id, f"it is {job.status}; nothing final has been done")
    if job.status in ACTIVE:
        return Step("follow", job.id, f"it is {job.status}, and is to be carried on")
    if job.status == "pending":
        why = "its data is flushed, then the chain changes"
        return Step("finalize", job.id, why)
    return Step("wait", job.id, f"it is {printable(job.status)}")


def _leftovers(
    record: Record, graph: BlockGraph, made: Iterable[str], *, stale: bool | None
) -> Iterable[Step]:
    done = took_effect(record, graph)
    if done or record.operation != "commit":
        yield from _settings(record, graph)
    if record.throttle:
        yield Step("restore-limits", record.devices[0], "the guest was slowed down for the pivot")
    if done is False:
        yield from _bitmaps(graph, record.bitmaps)
    else:
        yield from _bitmaps(graph, [(node, helper) for node, helper, _, _ in record.promotions])
    going: set[str] = set()
    if record.operation == "allocate":
        # Under somebody's snapshot the overlay stays, but not what it was put on for a while.
        for step in _without_zeros(record, graph):
            going.add(step.what)
            yield step
    if done:
        for node, file in record.leaving:
            if node in graph.nodes and graph.nodes[node].filename == file and may_go(graph, node):
                yield Step("delete-node", node, "it left the chain, and nothing uses it")
    for node in record.nodes:
        # An overlay that lies on an image has been written to by the guest, or could be, also
        # if its disk was unplugged since.
        if (
            node in graph.nodes
            and node not in going
            and may_go(graph, node)
            and not _may_hold_writes(record, graph, node, stale=stale)
        ):
            yield Step("delete-node", node, "we made it, and nothing uses it")
    used = {node.filename for node in graph.nodes.values()}
    ours = set(record.nodes) & set(graph.nodes)
    for file in made:
        if file not in used and not ours:
            yield Step("delete-file", file, "we made it, and it was never used")


def _settings(record: Record, graph: BlockGraph) -> Iterable[Step]:
    zeroes = tuple(_zeroes(record, graph))
    discard: tuple[Step, ...] = ()
    if record.discard and record.base in graph.nodes:
        why = "the guest's disk had it before the pivot"
        discard = (Step("restore-discard", record.base, why),)
    # QEMU takes detect-zeroes=unmap only beside discard=unmap.
    yield from (*discard, *zeroes) if record.discard == "unmap" else (*zeroes, *discard)


def _zeroes(record: Record, graph: BlockGraph) -> Iterable[Step]:
    base = graph.nodes.get(record.base)
    if record.detect_zeroes and base and base.detect_zeroes != record.detect_zeroes:
        why = "its detect-zeroes was off while it was frozen"
        if record.operation == "commit":
            why = "the guest's disk had it before the pivot"
        yield Step("restore-zeroes", base.name, why)


def _may_hold_writes(record: Record, graph: BlockGraph, node: str, *, stale: bool | None) -> bool:
    if record.operation != "allocate":
        return _lies_on_something(graph, node)
    if node != record.top or not _lies_on_something(graph, node):
        return False
    return record.base not in _active_nodes(record, graph) and stale is not True


def _lies_on_something(graph: BlockGraph, node: str) -> bool:
    return graph.nodes[node].child("backing") is not None


def _bitmaps(graph: BlockGraph, added: Iterable[tuple[str, str]]) -> list[Step]:
    return [
        Step("delete-bitmap", f"{node}/{name}", "we added it, and it is not needed any more")
        for node, name in added
        if node in graph.nodes and any(one.name == name for one in graph.nodes[node].bitmaps)
    ]
