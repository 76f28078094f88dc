"""Options of block nodes, changed for a while, and given back."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from qmpblock.changes.filters import set_child
from qmpblock.errors import UNTOUCHED, CommandError, UnsupportedError, printable
from qmpblock.graph.model import BlockGraph, Layer, Node
from qmpblock.graph.options import key_secret, overlay_options
from qmpblock.names import is_ours
from qmpblock.qemu.capabilities import Capabilities
from qmpblock.qemu.qemuio import qemu_io

if TYPE_CHECKING:
    from qmpblock.changes.between import Astray
    from qmpblock.qemu.connection import Connection

__all__ = [
    "check_copy_on_read",
    "lay",
    "name_below",
    "relink",
    "restore_discard",
    "restore_zeroes",
    "set_detect_zeroes",
    "set_writable",
]

_log = logging.getLogger(__name__)


def check_copy_on_read(capabilities: Capabilities, into: Layer) -> None:
    """Refuse to have QEMU copy on read into a layer where that would kill it.

    :raise UnsupportedError: see `Capabilities.copy_on_read_breaks_subclusters`.
    """
    if into.node.subclusters and capabilities.copy_on_read_breaks_subclusters:
        raise UnsupportedError(
            f"{printable(into.file)} has subclusters (extended_l2), and QEMU {capabilities} aborts "
            "when it copies from a backing image into such an image",
            standing=UNTOUCHED,
            remedy="commit instead, or use QEMU 10.0 or newer",
        )


async def lay(
    vm: Connection, node: str, below: str, options: Callable[[], Mapping[str, Any]]
) -> None:
    """Have an overlay of ours lie on another node, all else of it as it is.

    :param options: returns the whole description of its node, then; asked only where that is ours,
        for nothing need tell it of another: with which key it was opened, say.
    :raise UnsupportedError: it cannot be told.
    :raise Error: QEMU refused.
    """
    if is_ours(node):
        await vm.monitor.execute("blockdev-reopen", {"options": [options()]})
    else:  # its manager opened it, with options that nothing tells
        await set_child(vm, node, "backing", below)


async def relink(vm: Connection, node: str, below: str, graph: BlockGraph) -> None:
    """Have an overlay of ours lie on its image itself, without what was put between.

    Where QEMU refuses, what is between is brought home too, if there is room for it.

    :param node: the overlay's; `below`: the image's.
    """
    top = graph.nodes[node]

    def options() -> Mapping[str, Any]:
        storage = top.child("file")
        assert storage is not None  # an overlay of ours has a file
        secret = key_secret(Layer(0, top, None)) if top.encrypted else None
        return overlay_options(node, storage, top, secret, below)

    try:
        await lay(vm, node, below, options)
    except (CommandError, UnsupportedError) as error:
        _log.warning("%s stays where it is: %s", node, error)


async def name_below(vm: Connection, one: Astray) -> None:
    """Have an overlay's header name what it lies on; idempotent.

    Where QEMU cannot, that is said: the VM is not to end before somebody has done it.
    """
    name, file = one.over.node.name, printable(one.under.file)
    why = f"QEMU records no format but {one.over.format} there"
    if one.can_be_named:
        asked = {"device": one.root, "image-node-name": name, "backing-file": one.under.file}
        try:
            await vm.monitor.execute("change-backing-file", asked)
        except CommandError as error:
            why = printable(error.description)
        else:
            return
    _log.warning(
        "the header of %s does not name %s, on which it lies (%s): started again, the VM would be "
        "without what was written there. Before it ends, run: qmpblock commit ADDRESS DISK "
        "--base @1",
        *(printable(one.over.file), file, why),
    )


async def set_detect_zeroes(vm: Connection, node: str, value: str) -> None:
    """Change one option of a node, and see that it is so.

    By qemu-io, which keeps all others: what they are no command tells.

    :param value: `off`, `on` or `unmap`.
    :raise UnsupportedError: it had no effect.
    """
    node_now, said = await _reopen(vm, node, f"-o detect-zeroes={value}")
    if node_now is not None and node_now.detect_zeroes == value:
        return
    raise UnsupportedError(
        f"QEMU does not set detect-zeroes of {printable(node)} to {value}: {printable(said)}"
    )


async def set_writable(vm: Connection, node: str) -> None:
    """Make a node writable again that a snapshot has made read-only, as a commit job does.

    Only if it has: where QEMU cannot open the file again by its name (a relative one, and
    -daemonize), the snapshot left the node as it was, and to reopen it would spoil it: a job that
    writes to it then fails ("Could not open").

    :raise UnsupportedError: it had no effect.
    """
    known = (await vm.graph()).nodes.get(node)
    if known is not None and not known.read_only:
        return
    node_now, said = await _reopen(vm, node, "-w")
    if node_now is None or node_now.read_only:
        raise UnsupportedError(f"QEMU does not make {printable(node)} writable: {printable(said)}")


async def _reopen(vm: Connection, node: str, options: str) -> tuple[Node | None, str]:
    """Reopen a node by qemu-io; return it as it is afterwards, and what QEMU said."""
    said = await qemu_io(vm.monitor, node, f"reopen {options}")
    # By the graph, which waits where a query of the nodes would crash QEMU 7.2 (K7).
    return (await vm.graph()).nodes.get(node), said


async def restore_zeroes(vm: Connection, node: str, value: str) -> None:
    """Give a node its detect-zeroes back; that must not keep an overlay from coming home."""
    try:
        await set_detect_zeroes(vm, node, value)
    except (CommandError, UnsupportedError) as error:
        _log.warning("%s", error)


async def restore_discard(vm: Connection, node: str, value: str) -> None:
    """Give the base the `discard` of the layer that the guest comes from.

    Nothing tells whether it is so, but that QEMU does not complain. Idempotent.
    """
    try:
        said = await qemu_io(vm.monitor, node, f"reopen -o discard={value}")
    except UnsupportedError as error:
        said = str(error)
    if said:
        _log.warning(
            "QEMU does not set discard of %s to %s: %s", printable(node), value, printable(said)
        )
