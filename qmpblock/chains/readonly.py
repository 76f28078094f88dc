"""Why QEMU does not start a job that writes to a layer, and the remedy that fits."""

from __future__ import annotations

from collections.abc import Sequence

from qmpblock.errors import CommandError, Error, UnsupportedError, printable
from qmpblock.graph.model import Layer
from qmpblock.graph.options import options_of
from qmpblock.qemu.refusals import could_not_open, read_only, read_only_file_system

__all__ = ["refusal"]

_READABLE = frozenset({"curl", "ftp", "ftps", "http", "https"})  # drivers that cannot write


def refusal(error: CommandError, layer: Layer, command: Sequence[str]) -> Error:
    """Say in our words why QEMU did not start a job that writes to a layer, and what to do.

    :param command: QEMU's own command line; empty where it is not known.
    """
    said = error.description
    file = printable(layer.file)
    node = layer.storage or layer.node
    name = printable(node.name)
    if not read_only(error):
        error.standing = "nothing was changed"
        return error
    if read_only_file_system(error):
        remedy = f"the file system of {file} is mounted read-only: mount it for writing"
    elif could_not_open(error):
        remedy = (
            f"give whom QEMU runs as the right to write to {file} (owner, mode, chattr, the label "
            "of SELinux or AppArmor)"
        )
    elif _is_told(command, layer):
        remedy = (
            f"the VM was started with read-only=on for its storage node {name}; auto-read-only=on "
            "instead lets jobs write"
        )
    elif node.driver == "nbd":
        remedy = (
            f"{name} is an NBD client, and the server ({printable(node.filename)}) exports it "
            "read-only, or the node was added with read-only=on: both must allow writing"
        )
    elif node.driver in _READABLE:
        remedy = f"QEMU cannot write by {node.driver}: copy the image to this host's storage"
    elif node.driver == "host_device":
        remedy = (
            f"is the block device itself read-only (blockdev --getro {printable(node.filename)})? "
            f"Else its storage node {name} was given read-only=on; auto-read-only=on lets jobs "
            "write"
        )
    else:
        remedy = (
            f"its storage node {name} was given read-only=on; auto-read-only=on lets jobs write"
        )
    return UnsupportedError(
        f"QEMU has @{layer.depth} {file} open for reading only: {printable(said)}",
        standing="nothing was changed",
        remedy=remedy,
    )


def _is_told(command: Sequence[str], layer: Layer) -> bool:
    """Whether the command line says that a node of this layer's file is read-only."""
    return any(
        options_of(command, node).get("read-only") in (True, "on", "yes", "true")
        for node in layer.nodes[1:]
    )
