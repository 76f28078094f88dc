"""Strips: what a map holds, summed up cell by cell, ready to be drawn.

A picture of a disk is a list of strips under each other; a strip is a value, so today's
picture and a plan's are drawn by the same code. Every strip of a picture has the same
edges or, for a drawing to scale, edges of its own.

Pure: NumPy only. Offsets and amounts are bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from qmpblock.errors import RequestError, printable
from qmpblock.extents.allocationmap import PRESENT, RESERVED, ZERO, AllocationMap

__all__ = [
    "ABSENT",
    "DATA",
    "RESERVED_ZERO",
    "ZEROS",
    "Strip",
    "grid",
    "guest_strip",
    "layer_strip",
    "layer_strips",
    "zeros_strip",
]

#: What a byte counts as; the last axis of `Strip.held`.
DATA, ZEROS, RESERVED_ZERO, ABSENT = range(4)

_PIECE = 1 << 20  # extents summed up at a time: bounds the memory beside the map
_KIND = np.array(
    [
        ABSENT if not f & PRESENT else DATA if not f & ZERO else
        RESERVED_ZERO if f & RESERVED else ZEROS
        for f in range(16)
    ],
    np.int64,
)  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class Strip:
    """One row of a picture.

    :ivar label: what it is called; may come from a peer, so drawing escapes it.
    :ivar role: the implicit zeros, one layer's own content, or what the guest sees.
    :ivar edges: int64, where each cell starts, and where the last one stops.
    :ivar held: bytes in each cell, of shape (cells, layers, kinds); a strip of a single
        layer has one on its second axis.
    :ivar depth: the layer's depth; for the guest's strip 0, where its second axis starts.
    :ivar end: where the layer ends; nothing is drawn past it.
    """

    label: str
    role: Literal["zeros", "layer", "guest"]
    edges: npt.NDArray[np.int64]
    held: npt.NDArray[np.int64]
    depth: int
    end: int

    @property
    def kinds(self) -> npt.NDArray[np.int64]:
        """Return the bytes of each kind in each cell, of shape (cells, kinds)."""
        bytes_held: npt.NDArray[np.int64] = self.held.sum(axis=1)
        return bytes_held

    @property
    def supplier(self) -> npt.NDArray[np.int64]:
        """Return for each cell the depth that counts for it, or -1 where no layer holds any.

        That is the layer with most of its data; where there is none, of its zeros.
        """
        data = self.held[:, :, DATA]
        zeros = self.held[:, :, ZEROS] + self.held[:, :, RESERVED_ZERO]
        chosen = np.where(data.any(axis=1), data.argmax(axis=1), zeros.argmax(axis=1))
        nothing = ~(data.any(axis=1) | zeros.any(axis=1))
        return np.where(nothing, -1, chosen + self.depth)


def grid(offset: int, stop: int, cells: int) -> npt.NDArray[np.int64]:
    """Cut a range into equal cells, to the byte; fewer where there are fewer bytes."""
    cells = max(1, min(cells, stop - offset))
    # Python's integers: cells * size may pass 2**63.
    return np.array([offset + (stop - offset) * i // cells for i in range(cells + 1)], np.int64)


def layer_strips(
    layers: Sequence[tuple[str, AllocationMap]], guest: AllocationMap, edges: npt.NDArray[np.int64]
) -> list[Strip]:
    """Return the whole picture: implicit zeros, each layer, then what the guest sees.

    :param layers: label and own content (`AllocationMap.own`) from the base to the active
        layer, in the order they are drawn.
    :param guest: what the guest sees; the edges lie inside it.
    """
    top = len(layers) - 1
    return [
        zeros_strip(edges),
        *(layer_strip(label, own, top - i, edges) for i, (label, own) in enumerate(layers)),
        guest_strip("guest sees", guest, edges),
    ]


def zeros_strip(edges: npt.NDArray[np.int64]) -> Strip:
    """Return the strip of the zeros that lie below every chain."""
    held = np.zeros((len(edges) - 1, 1, 4), np.int64)
    held[:, 0, ZEROS] = np.diff(edges)
    return Strip("implicit zeros", "zeros", edges, held, -1, int(edges[-1]))


def layer_strip(label: str, own: AllocationMap, depth: int, edges: npt.NDArray[np.int64]) -> Strip:
    """Return the strip of one layer's own content.

    :raise RequestError: the map is of a chain.
    """
    if own.layers != 1:
        raise RequestError(f"the map of {printable(label)} is of a chain, not of one layer")
    return _strip(label, "layer", own, edges, depth, own.stop)


def guest_strip(label: str, seen: AllocationMap, edges: npt.NDArray[np.int64]) -> Strip:
    """Return the strip of a map that names the layer of each extent."""
    return _strip(label, "guest", seen, edges, 0, seen.stop)


def _strip(
    label: str,
    role: Literal["layer", "guest"],
    source: AllocationMap,
    edges: npt.NDArray[np.int64],
    depth: int,
    end: int,
) -> Strip:
    cells, layers = len(edges) - 1, source.layers
    held = np.zeros(cells * layers * 4, np.float64)
    first = max(int(edges[0]), source.start)
    last = min(int(edges[-1]), source.stop)
    window = source.clip(first, last - first) if first < last else None
    for at in range(0, len(window) if window else 0, _PIECE):
        assert window is not None
        bounds = window.offsets[at : at + _PIECE + 1]
        stop = int(bounds[-1]) if len(bounds) > _PIECE else window.stop
        piece = window.clip(int(bounds[0]), stop - int(bounds[0])).cut(edges)
        counts = np.diff(np.searchsorted(piece.offsets, edges))
        cell = np.repeat(np.arange(cells), counts)
        key = (cell * layers + piece.depth) * 4 + _KIND[piece.flags]
        # Sums of doubles: past 2**53 bytes a cell they round, but never to zero.
        held += np.bincount(key, weights=piece.lengths, minlength=len(held))
    table = held.astype(np.int64).reshape(cells, layers, 4)
    return Strip(label, role, edges, table, depth, end)
