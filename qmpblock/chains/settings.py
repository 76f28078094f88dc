"""What a guest's disk is set to, and what of that another active layer would have. Pure.

QEMU keeps these with the node of an image, and a snapshot or a pivot puts the guest on another:

    option            known by          an overlay      after a pivot
    detect-zeroes     QEMU              has it, too     given back
    discard           the command line  has it, too     given back
    cache             QEMU              has it, too     said where the base has another
    aio               the command line  has it, too     said where the base has another
    copy-on-read      the command line  said            said, unless it is the image's own again
    write threshold   QEMU              said            said

What the guest's device has (rerror, werror, write-cache), limits of a legacy -drive and filters
above the active layer stay where they are. An image that QEMU opened by itself, because another
one names it, has QEMU's defaults there: no detection, `discard=unmap`, `aio=threads`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from qmpblock.errors import printable
from qmpblock.graph.model import Chain, DiskDevice, Layer
from qmpblock.graph.options import aio_of, discard_of, options_of

__all__ = ["discard_to_restore", "lost_by_commit", "lost_by_snapshot", "wanted_discard"]


def wanted_discard(command: Sequence[str], chain: Chain) -> str | None:
    """Return the `discard` that the owner of a disk gave it; None where nothing tells.

    By the uppermost layer that the command line names: what is above it came later.
    """
    for layer in chain.layers:
        if options_of(command, layer.node):
            return discard_of(command, layer.node)
    return None


def discard_to_restore(command: Sequence[str], chain: Chain, base: Layer) -> str:
    """Return the `discard` that a base is to get when the guest moves there; empty: it has it."""
    wanted = wanted_discard(command, chain)
    return wanted if wanted and wanted != discard_of(command, base.node) else ""


def lost_by_snapshot(
    command: Sequence[str], device: DiskDevice, *, watched: bool = False
) -> Iterator[str]:
    """Say what an overlay will not have.

    :param watched: whether a write threshold is ours, and follows the guest.
    """
    active = device.chain.active
    if _copies_on_read(command, active):
        yield (
            f"copy-on-read=on of {device.name} does not go on in the overlay: as a filter node "
            "above the image (-blockdev copy-on-read) it would"
        )
    yield from _threshold(device, active, watched=watched)


def lost_by_commit(
    command: Sequence[str], device: DiskDevice, base: Layer, *, watched: bool = False
) -> Iterator[str]:
    """Say what the guest's disk will not have, or have otherwise, when it is on the base."""
    active = device.chain.active
    here, there = active.storage or active.node, base.storage or base.node
    for option in ("direct", "no-flush"):
        if (option in here.cache) is not (option in there.cache):
            yield (
                f"cache.{option} of {device.name} is {_on(option in here.cache)} now, and will be "
                f"{_on(option in there.cache)}: so the VM has {printable(base.file)} open"
            )
    mine, others = aio_of(command, here), aio_of(command, there)
    if mine is not None and mine != (others or "threads"):
        yield (
            f"aio of {device.name} is {mine} now, and will be {others or 'threads'}: so the VM has "
            f"{printable(base.file)} open"
        )
    if _copies_on_read(command, active) and not _copies_on_read(command, base):
        yield f"copy-on-read=on of {device.name} does not go on in {printable(base.file)}"
    yield from _threshold(device, active, watched=watched)


def _copies_on_read(command: Sequence[str], layer: Layer) -> bool:
    return options_of(command, layer.node).get("copy-on-read") in ("on", "yes", "true")


def _threshold(device: DiskDevice, active: Layer, *, watched: bool) -> Iterator[str]:
    for node in active.nodes:
        if node.write_threshold and not watched:
            yield (
                f"the write threshold at {node.write_threshold} of {printable(node.name)} stays "
                f"with that node: nobody is told any more what {device.name} takes"
            )


def _on(value: bool) -> str:
    return "on" if value else "off"
