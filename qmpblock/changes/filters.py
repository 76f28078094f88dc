"""A filter of ours in the way of a disk's requests: where it goes, how it gets there and away.

It comes right above the layers and whatever filters keep or change what passes::

    guest -> throttle -> OURS -> copy-on-read -> active layer

So what we ourselves read through it is not charged to a `throttle` of the guest's (nor is it to
limits of the device, `block_set_io_throttle`), and no filter of the VM's is lost. With no throttle
above it, it is the device's `drive` by qom-set; else the throttle's child by qemu-io's `reopen`,
which keeps all options that it is not given (F14).

It is taken out by what is seen then: whatever lies on it, of whomever, comes to lie on what it lies
on. Somebody may have taken a snapshot on either side of it.
"""

from __future__ import annotations

import logging
import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qmpblock.errors import CommandError, InUseError, printable
from qmpblock.graph.model import BlockGraph, DiskDevice
from qmpblock.qemu.qemuio import check_taken, line_of, qemu_io, takes

if TYPE_CHECKING:
    from qmpblock.qemu.connection import Connection

__all__ = ["Spot", "put_back", "put_filter", "set_child", "spot_in", "take_out"]

_log = logging.getLogger(__name__)
_FORMAT = "copy-before-wri"  # of a header that says copy-before-write: there is room for no more


@dataclass(frozen=True)
class Spot:
    """Where in a disk's way a filter of ours goes.

    :ivar device: the QOM path of the device.
    :ivar above: the node that is to lie on it; empty where the device itself does.
    :ivar below: the node that it lies on.
    """

    device: str
    above: str
    below: str


def spot_in(device: DiskDevice) -> Spot:
    """Choose where it goes. Pure."""
    above = ""
    for node in device.chain.filters:
        if node.driver != "throttle" or not takes(node.name):
            return Spot(device.qom_path, above, node.name)
        above = node.name
    return Spot(device.qom_path, above, device.chain.active.node.name)


async def put_filter(vm: Connection, spot: Spot, node: str) -> None:
    """Put a node of ours there, which lies on `spot.below` already.

    :raise Error: QEMU refused; the disk is as it was.
    """
    if spot.above:
        await set_child(vm, spot.above, "file", node)
    else:
        await _set_drive(vm, spot.device, node)


async def take_out(vm: Connection, node: str, graph: BlockGraph) -> None:
    """Have all that lies on a filter of ours lie on what that lies on. Idempotent.

    :param graph: as it is now.
    :raise InUseError: somebody else reads what we show through it.
    :raise Error: QEMU refused.
    """
    below = graph.nodes[node].child("file") if node in graph.nodes else None
    if below is None:
        return  # it is gone
    for parent in graph.parents(node):
        known = graph.nodes[parent]
        edge = next(edge.name for edge in known.children if edge.node == node)
        if known.driver == "snapshot-access":
            shown = _root(graph, parent)
            users = ", ".join(graph.users(shown))
            raise InUseError(
                f"{printable(shown)} is used by {users or 'somebody'}, so the filter below it "
                f"stays in the way of the guest's writes"
            )
        await set_child(vm, parent, edge, below)
        if edge == "backing":
            await _tell_of_header(vm, parent, below, graph)
    for device in graph.disks():
        if device.chain.root.name == node:
            await _set_drive(vm, device.qom_path, below)


async def _tell_of_header(vm: Connection, overlay: str, below: str, graph: BlockGraph) -> None:
    """Say where a snapshot over a filter of ours has recorded that as a format (K45).

    It is somebody's, so it is left as it is; started from it again, no VM would open it.

    :param below: on which the overlay lies now.
    """
    for node in await vm.monitor.execute("query-named-block-nodes", {"flat": True}):
        if node["node-name"] != overlay:
            continue
        if not str(node["image"].get("backing-filename-format")).startswith(_FORMAT):
            return
        while graph.nodes[below].is_filter and (child := graph.nodes[below].child("file")):
            below = child
        top = graph.nodes[overlay]
        words = ("-f", top.driver, "-F", graph.nodes[below].driver)
        files = ("-b", top.backing_filename or "IMAGE", top.filename)
        command = shlex.join(("qemu-img", "rebase", "-u", *words, *files))
        _log.warning(
            "somebody took a snapshot while a filter of ours was on top, and QEMU has recorded in "
            "%s that what it lies on is of the format copy-before-write: no VM can be started from "
            "it so. Once this one is shut down, before it is started again, run: %s",
            printable(top.filename),
            printable(command),
        )


async def put_back(vm: Connection, device: DiskDevice, node: str) -> None:
    """Have a disk lie on another node than its active layer, below the filters that it has.

    :raise Error: QEMU refused; the disk is as it was.
    """
    filters = device.chain.filters
    if filters:
        await set_child(vm, filters[-1].name, "file", node)
    else:
        await _set_drive(vm, device.qom_path, node)


def _root(graph: BlockGraph, node: str) -> str:
    """Return what it is seen by: a node with a name, where it has none that we gave it."""
    for _ in graph.nodes:
        above = graph.parents(node)
        if not node.startswith("#") or not above:
            break
        node = above[0]
    return node


async def _set_drive(vm: Connection, device: str, node: str) -> None:
    # Never the one that it has: QEMU would abort (K3). It was another one in the last graph.
    what = {"path": device, "property": "drive", "value": node}
    await vm.monitor.execute("qom-set", what)


async def set_child(vm: Connection, node: str, edge: str, child: str) -> None:
    """Have a node lie on another one, all else of it as it is.

    :param edge: how it does: `file` or `backing`.
    :raise Error: QEMU refused.
    """
    check_taken(child)
    command = f"reopen -o {edge}={child}"
    said = await qemu_io(vm.monitor, node, command)
    if said:
        line = line_of(node, command)
        raise CommandError("human-monitor-command", line, "GenericError", said)
