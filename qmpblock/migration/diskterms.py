"""Disk terms: what of a guest's disks goes along, and onto what. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qmpblock.errors import UNTOUCHED, RequestError

__all__ = ["DiskTerms", "Layers"]

Layers = Literal["all", "top"]


@dataclass(frozen=True)
class DiskTerms:
    """What a migration does with the disks.

    :ivar copies: whether they are copied; else both ends have the same images.
    :ivar layers: of each disk, what is copied: all that it holds, or of a chain the active layer
        alone, onto an image that lies on the same backing image.
    :ivar same_backing: the user's word that what those images lie on holds the same, where that
        cannot be seen.
    """

    copies: bool = True
    layers: Layers = "all"
    same_backing: bool = False

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
        if self.same_backing and self.layers != "top":
            raise RequestError(
                "what an image lies on is of no account where all layers are copied (same backing)",
                standing=UNTOUCHED,
                remedy="leave it out, or copy the active layer alone (layers top)",
            )
