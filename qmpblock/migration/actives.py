"""Actives: that the guest writes, until it stands, to the images that were meant.

Somebody else may take a snapshot at any time, below a filter also under a mirror. Where both ends
have the same images, what the guest writes into that overlay stays at the source, and the guest
would go on without it; a dirty bitmap that goes along marks nothing of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qmpblock.copying.frame import check_actives
from qmpblock.errors import CommandError

if TYPE_CHECKING:
    from qmpblock.graph.model import DiskDevice
    from qmpblock.qemu.connection import Connection

__all__ = ["Actives", "above"]

_GRAPH = "x-debug-query-block-graph"

_Edges = frozenset[tuple[str, str, str]]


class Actives:
    """Those of one migration. `note` while the guest runs, `check` once it stands.

    :param vm: the source.
    """

    def __init__(self, vm: Connection) -> None:
        self._vm = vm
        self._disks: tuple[DiskDevice, ...] = ()
        self._above: _Edges | None = None

    async def note(self, disks: Sequence[DiskDevice]) -> None:
        """See that these disks have the active layers that they had, and are to keep.

        :raise GraphError: one has another.
        """
        self._disks = tuple(disks)
        if disks:
            self._above = await self._look()
            await check_actives(self._vm, disks)

    async def check(self) -> None:
        """See that they still have them, now that the guest stands: so it has to be quick.

        :raise GraphError: one has another.
        """
        if self._disks and (self._above is None or self._above != await self._look()):
            await check_actives(self._vm, self._disks)

    async def _look(self) -> _Edges | None:
        """Return what lies above the active layers; None where this QEMU does not tell it."""
        try:
            graph = await self._vm.monitor.execute(_GRAPH)
        except CommandError:  # unstable: a later QEMU may drop it
            return None
        return above(graph, {disk.chain.active.node.name for disk in self._disks})


def above(graph: Mapping[str, Any], nodes: set[str]) -> _Edges:
    """Return the edges by which nodes are used, and what uses them is: (parent, edge, child).

    :param graph: the reply of x-debug-query-block-graph.
    """
    names = {one["id"]: str(one["name"]) for one in graph["nodes"]}
    edges = [(one["parent"], str(one["name"]), one["child"]) for one in graph["edges"]]
    found: set[tuple[int, str, int]] = set()
    below = {key for key, name in names.items() if name in nodes}
    while below:
        new = {edge for edge in edges if edge[2] in below} - found
        found |= new
        below = {parent for parent, _, _ in new}
    return frozenset((names[parent], edge, names[child]) for parent, edge, child in found)
