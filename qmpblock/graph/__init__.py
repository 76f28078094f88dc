"""Who is stacked on whom inside a running QEMU, as it told, and what follows from it. Pure.

Names are imported when they are first used: what is told of closed images needs none of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qmpblock.graph.builder import Replies, build
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

__all__ = [
    "FILTERS",
    "Bitmap",
    "BlockGraph",
    "Chain",
    "Device",
    "DiskDevice",
    "Edge",
    "JobInfo",
    "Layer",
    "Node",
    "Replies",
    "build",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from qmpblock.graph import builder, model

    return getattr(builder if name in builder.__all__ else model, name)


def __dir__() -> list[str]:
    return __all__
