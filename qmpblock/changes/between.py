"""Between: an overlay of ours that a manager has put on another layer than its header names (F45).

A manager takes whichever layer is active for what the guest moves up from. Where somebody has taken
a snapshot in the last moment, that is theirs, and the header of ours leads past it: started again,
the VM would be without what was written there. So it is made to name theirs, by whoever sees it
first: the controller itself, or who undoes what it left. Pure.

Only a header that is still as we made it is changed, and only while the overlay lies on what we did
not make it for: what somebody has changed since is right, and stays.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from qmpblock.changes.record import is_in
from qmpblock.changes.step import Step
from qmpblock.graph.model import BlockGraph, Layer

__all__ = ["Astray", "Made", "astray", "name_below"]

Made = tuple[str, str, str, str]
"""An overlay: its file; node and file of the image it was made for; the name in its header."""


@dataclass(frozen=True)
class Astray:
    """An overlay whose header leads past what it lies on.

    :ivar root: the root node of its disk.
    :ivar over: the overlay; `under`: what it lies on.
    """

    root: str
    over: Layer
    under: Layer

    @property
    def can_be_named(self) -> bool:
        """Whether QEMU can have the header name it: it records the overlay's own format with it."""
        return self.under.format == self.over.format


def astray(graph: BlockGraph, made: Iterable[Made]) -> Iterable[Astray]:
    """Yield the overlays of which that is so.

    :param made: those that we made.
    """
    for device in graph.disks():
        layers = device.chain.layers
        for over, under in pairwise(layers):
            for file, node, image, name in made:
                if (
                    is_in(graph, over.node.name, file)
                    and over.node.backing_filename == name
                    and over.node.child("backing") == under.node.name != node
                    and not is_in(graph, under.node.name, image)
                ):
                    yield Astray(device.chain.root.name, over, under)


def name_below(graph: BlockGraph, made: Iterable[Made]) -> Iterable[Step]:
    """Yield what has their headers name what they lie on."""
    for one in astray(graph, made):
        why = "its header leads past a snapshot that somebody else took in the last moment"
        yield Step("name-below", one.over.node.name, why, one)
