"""What a map is: which layer supplies every byte of a disk. Pure."""

from qmpblock.extents.allocationmap import (
    DATA,
    PRESENT,
    RESERVED,
    ZERO,
    AllocationMap,
    Extent,
    LayerTotals,
    Ranges,
    Totals,
    layer_extents_json,
)
from qmpblock.extents.blockstatus import ExtentAllowance, NBDMapBuilder

__all__ = [
    "DATA",
    "PRESENT",
    "RESERVED",
    "ZERO",
    "AllocationMap",
    "Extent",
    "ExtentAllowance",
    "LayerTotals",
    "NBDMapBuilder",
    "Ranges",
    "Totals",
    "layer_extents_json",
]
