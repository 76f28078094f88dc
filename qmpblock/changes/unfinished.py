"""What is left to do of a change whose controller gave up or died. Pure.

The plan follows from the change's record, what its journal adds, and the block graph with
its jobs as they are now; nothing is remembered, so it can be made anew after every step, by
anybody, however often: `steps` of a VM in which nothing is left are none, but for wires (what
belongs to one is no node, and not seen in the graph). No operation is known
here: what is one's own the record answers (`qmpblock.changes.operations`).

A job is dealt with first, and alone, because its end changes the graph; those that have ended are
dismissed together::

    created .. standby   undo: cancel          continue: follow
    waiting, aborting    wait
    pending              a pivot: mark, finalize at once (it holds the guest's I/O, K5)
                         else undo: cancel     continue: flush (K6), finalize
    concluded            dismiss

Then a guest that was paused for it goes on, and what is left over is removed: nodes and files that
we made and nothing uses, the nodes of layers that left the chain, dirty bitmaps whose commit did
not happen.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from qmpblock.changes.record import Record, without_bitmaps
from qmpblock.changes.step import Choice, Step
from qmpblock.graph.layeruse import may_go
from qmpblock.graph.model import BlockGraph
from qmpblock.names import partial_file, paused_node

__all__ = ["steps"]


def steps(
    record: Record,
    graph: BlockGraph,
    choice: Choice,
    made: Iterable[str] = (),
    *,
    kept: Collection[str] = (),
    stale: bool | None = None,
) -> tuple[Step, ...]:
    """Return what is to be done next; nothing where nothing is left.

    :param made: image files that the journal says the change made itself.
    :param kept: those of them that another copy can go on from.
    :param stale: whether the journal says that the overlay of a pivot is stale; None: there
        is no journal.
    """
    record = record.seen_in(graph)
    ended: list[Step] = []
    for name in (record.job, *record.helpers):
        job = graph.job(name)
        if job is not None:
            # What only prepares is never carried on.
            mine = choice if name == record.job else Choice.UNDO
            step = record.of_job(job, mine, graph, stale=stale)
            if step.verb == "dismiss":  # with which nothing changes for the others
                ended.append(step)
                continue
            if ended:
                break
            # While the job runs its base is writable, and lets persistent bitmaps go.
            bitmaps = without_bitmaps(graph, record.bitmaps) if step.verb == "cancel" else []
            return (*bitmaps, step)
    if ended:
        return tuple(ended)
    asked = record.of_manager(graph)
    if asked:
        return asked
    paused = paused_node(record.run)
    if paused in graph.nodes:
        return (Step("resume", paused, "the VM was paused for a moment, and is to go on"),)
    home = record.way_home(graph, stale=stale)
    return home or tuple(_leftovers(record, graph, made, kept, stale=stale))


def _leftovers(
    record: Record,
    graph: BlockGraph,
    made: Iterable[str],
    kept: Collection[str],
    *,
    stale: bool | None,
) -> Iterable[Step]:
    done = record.took_effect(graph)
    going: set[str] = set()  # each goes before what it lies on
    stays: set[str] = set()
    freed: set[str] = set()
    for step in record.gives_back(graph, done=done):
        if step.verb == "delete-node":
            going.add(step.what)
        elif step.verb == "relink":
            stays.add(step.what)
        elif step.verb == "take-out":
            freed.add(step.what)
        yield step
    if done:
        for node, file in record.leaving:
            there = node in graph.nodes and graph.nodes[node].filename == file
            if there and may_go(graph, node, going):
                going.add(node)
                yield Step("delete-node", node, "it left the chain, and nothing uses it")
    for node in record.nodes:
        if (
            node in graph.nodes
            and node not in going | stays
            and (node in freed or may_go(graph, node, going))
            and not record.may_hold_writes(graph, node, stale=stale)
        ):
            going.add(node)
            yield Step("delete-node", node, "we made it, and nothing uses it")
    used = {node.filename for node in graph.nodes.values()}
    ours = set(record.nodes) & set(graph.nodes)
    for file in made:
        if file in used or ours:
            continue
        if file in kept:
            yield Step("keep-file", file, "another copy can go on from it", partial_file(file))
        else:
            yield Step("delete-file", file, "we made it, and it was never used")
    if not ours:
        for wire, socket in record.wires:
            why = "its credentials, and the directory of its socket, go where they are left"
            yield Step("clear-wire", wire, why, socket)
