"""Disk terms: what of a guest's disks goes along, and onto what. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qmpblock.errors import UNTOUCHED, RequestError

__all__ = ["ALLOCATIONS", "Allocation", "DiskTerms", "Layers"]

Layers = Literal["all", "top"]
Allocation = Literal["thin", "full", "same"]

ALLOCATIONS: tuple[Allocation, ...] = ("thin", "full", "same")


@dataclass(frozen=True)
class DiskTerms:
    """What a migration does with the disks.

    :ivar copies: whether they are copied; else both ends have the same images.
    :ivar layers: of each disk, what is copied: all that it holds, or of a chain the active layer
        alone, onto an image that lies on the same backing image.
    :ivar same_backing: the user's word that what those images lie on holds the same, where that
        cannot be seen.
    :ivar allocation: what has host space at the destination: what is data, every byte, or what has
        it at the source.
    """

    copies: bool = True
    layers: Layers = "all"
    same_backing: bool = False
    allocation: Allocation = "thin"

    def check(self) -> None:
        """Refuse what does not go together.

        :raise RequestError: it says which; nothing was touched.
        """
        if self.layers == "top" and not self.copies:
            raise RequestError(
                "no layer is copied (layers top) where both VMs have the same images",
                standing=UNTOUCHED,
                remedy="leave one of the two out",
            )
        if self.allocation != "thin" and not self.copies:
            raise RequestError(
                "images that both VMs have get no host space by a migration (allocation)",
                standing=UNTOUCHED,
                remedy="leave one of the two out; or have it allocated: qmpblock allocate "
                "ADDRESS DISK --full",
            )
        if self.allocation == "full" and self.layers == "top":
            raise RequestError(
                "an image that lies on another (layers top) is not to have host space for all of "
                "itself: it would hide all of what it lies on",
                standing=UNTOUCHED,
                remedy="copy all layers, or leave the allocation out",
            )
        if self.same_backing and self.layers != "top":
            raise RequestError(
                "what an image lies on is of no account where all layers are copied (same backing)",
                standing=UNTOUCHED,
                remedy="leave it out, or copy the active layer alone (layers top)",
            )
