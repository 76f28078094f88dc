"""Settings of block nodes that changes give back, as their records say them. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from qmpblock.changes.step import Step
from qmpblock.graph.jsonname import from_text
from qmpblock.graph.model import BlockGraph
from qmpblock.versioned import UnreadableError

__all__ = ["check_settings", "discard_and_zeroes_of", "zeroes_of"]


def zeroes_of(graph: BlockGraph, node: str, value: str, why: str) -> Iterable[Step]:
    """Yield what gives a node its detect-zeroes back, if it is to have one and has another."""
    known = graph.nodes.get(node)
    if value and known is not None and known.detect_zeroes != value:
        yield Step("restore-zeroes", node, why, value)


def discard_and_zeroes_of(
    graph: BlockGraph, node: str, discard: str, zeroes: str, why: str
) -> Iterable[Step]:
    """Yield what gives a node both settings back, each if it is to have one; in QEMU's order."""
    steps = list(zeroes_of(graph, node, zeroes, why))
    if discard and node in graph.nodes:
        # QEMU takes detect-zeroes=unmap only beside discard=unmap.
        step = Step("restore-discard", node, why, discard)
        steps.insert(0 if discard == "unmap" else len(steps), step)
    yield from steps


def check_settings(detect_zeroes: str, discard: str, base_opened: str) -> None:
    """See that what goes into a command line is what may stand there.

    :raise UnreadableError: it is not.
    """
    if detect_zeroes not in ("", "off", "on", "unmap"):
        raise UnreadableError("its detect_zeroes is none")
    if discard not in ("", "ignore", "unmap"):
        raise UnreadableError("its discard is none")
    if base_opened and not from_text(base_opened).get("driver"):
        raise UnreadableError("its base_opened opens nothing")
