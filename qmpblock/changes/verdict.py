"""Which image holds the data, now that QEMU has died in the middle of a change. Pure."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ImageVerdict"]


@dataclass(frozen=True)
class ImageVerdict:
    """What a change means for the images, now that QEMU is gone.

    :ivar start: the image to start the VM from.
    :ivar stale: images that must not be used: newer data is elsewhere.
    :ivar unused: images that were made and hold nothing: they can be removed.
    :ivar kept: images that were made and are not whole, from which another copy can go on: they
        get the name that says so.
    :ivar why: in a sentence.
    :ivar commit: overlays that must be committed into an image before it is started, each
        with that image.
    :ivar opened: the options that open the image to start from, where it is another one than
        before, and its file name and format do not suffice; else empty.
    :ivar waits: whether more is to be done, once the VM has been started again.
    :ivar uncertain: whether a word of the journal that is missing would make it another one.
    """

    start: tuple[str, ...]
    stale: tuple[str, ...]
    unused: tuple[str, ...]
    why: str
    commit: tuple[tuple[str, str], ...] = ()
    opened: str = ""
    uncertain: bool = False
    kept: tuple[str, ...] = ()
    waits: bool = False
