"""Which image holds the data, now that QEMU has died in the middle of a change. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from qmpblock.changes.record import Record, pivoted

__all__ = ["ImageVerdict", "image_verdict"]


@dataclass(frozen=True)
class ImageVerdict:
    """What a change means for the images, now that QEMU is gone.

    :ivar start: the image to start the VM from.
    :ivar stale: images that must not be used: newer data is elsewhere.
    :ivar unused: images that were made and hold nothing: they can be removed.
    :ivar why: in a sentence.
    :ivar commit: overlays that must be committed into an image before it is started, each
        with that image.
    """

    start: tuple[str, ...]
    stale: tuple[str, ...]
    unused: tuple[str, ...]
    why: str
    commit: tuple[tuple[str, str], ...] = ()


def image_verdict(
    record: Record, entries: Iterable[Mapping[str, object]], empty: Mapping[str, bool]
) -> ImageVerdict:
    """Say which image to start from (F13).

    :param entries: of the journal.
    :param empty: for each image that the change made and that is there: whether it is
        certain that it holds nothing.
    """
    active = record.images[: len(record.devices)]
    if record.operation == "snapshot":
        if any(not nothing for nothing in empty.values()):
            # An overlay shows what lies below where it holds nothing, so that the whole set
            # is right, also for a disk to which the guest had not written yet.
            return ImageVerdict(record.files, (), (), "the guest had begun to write to an overlay")
        return ImageVerdict(
            active, (), tuple(empty), "nothing was written to an overlay: the images hold it all"
        )
    if record.operation == "allocate" and record.pivot:
        return _verdict_of_staging(record, pivoted(entries), empty)
    if record.pivot and pivoted(entries):
        return ImageVerdict(
            (record.base_file,),
            (record.top_file,),
            (),
            "the commit was complete and the guest had moved on to the base: it may hold newer "
            "data, and the overlay is stale",
        )
    if record.operation == "commit":
        why = (
            "the commit was not complete: the overlay holds the newest data. The base has got "
            "a part of it and shows no point in time by itself"
        )
        return ImageVerdict(active, (), (), why)
    return ImageVerdict(
        active,
        (),
        (),
        "a stream changes no content: every link in the chain is as the headers say, and whole",
    )


def _verdict_of_staging(record: Record, stale: bool, empty: Mapping[str, bool]) -> ImageVerdict:
    """Say what a staged commit that was broken off means: its overlay is newest, unless stale."""
    others = tuple(file for file in empty if file != record.top_file)
    if record.top_file not in empty:
        return ImageVerdict((record.base_file,), (), others, "no overlay of ours is left")
    if stale:
        why = "the guest was back on the image; the overlay is stale"
        return ImageVerdict((record.base_file,), (), (*others, record.top_file), why)
    if empty[record.top_file]:
        why = "nothing was written to the overlay"
        return ImageVerdict((record.base_file,), (), (*others, record.top_file), why)
    return ImageVerdict(
        (record.base_file,),
        (),
        others,
        "the overlay held what the guest wrote last",
        commit=((record.top_file, record.base_file),),
    )
