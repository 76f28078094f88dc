"""Who is stacked on whom inside a running QEMU, as it told, and what follows from it. Pure."""

from qmpblock.graph.model import (
    FILTERS,
    Bitmap,
    BlockGraph,
    Chain,
    Device,
    Edge,
    Job,
    Layer,
    Node,
    Replies,
)

__all__ = [
    "FILTERS",
    "Bitmap",
    "BlockGraph",
    "Chain",
    "Device",
    "Edge",
    "Job",
    "Layer",
    "Node",
    "Replies",
]
