"""What speaks against writing to an image, and why QEMU does not. Pure.

- **A disk that the VM has for reading only** (`read-only=on`, a CD) is not written to, although
  QEMU would take a snapshot of it, after which it is writable, and commit into it.
- **An image that QEMU marked as corrupt** is opened for reading only, also as the base of a
  chain; but a job opens it for writing then, and no VM can be started from it afterwards.
- **An image that was not closed** (its QEMU was killed) and keeps its reference counts lazily has
  wrong ones until somebody opens it for writing, and repairs it so. Opened for reading, as the
  base of a chain is, and made writable by a job, it is not repaired: what is committed lands on
  clusters that are in use: what was there is lost, without an error (7.2.22 and 11.1.2, each
  time). Of QED images QEMU does not tell (`dirty-flag` is false, whatever the header says).
"""

from __future__ import annotations

from collections.abc import Sequence

from qmpblock.errors import UNTOUCHED, CommandError, Error, UnsupportedError, printable
from qmpblock.graph.model import Device, Layer
from qmpblock.graph.options import options_of

__all__ = ["check_disk", "check_sound", "refusal"]

_READABLE = frozenset({"curl", "ftp", "ftps", "http", "https"})  # drivers that cannot write


def check_disk(device: Device) -> None:
    """Refuse to change a disk that the VM has for reading only.

    Frozen layers are read-only by nature; this is about the active one.

    :raise UnsupportedError: it has.
    """
    assert device.chain is not None  # BlockGraph.device refuses empty drives
    active = device.chain.active
    if device.read_only or device.chain.root.read_only or active.node.read_only:
        raise UnsupportedError(
            f"the VM has {device.name} ({printable(active.file)}) for reading only, and it would "
            "be written to",
            standing=UNTOUCHED,
            remedy="if it is meant to be written, start the VM with read-only=off for this disk "
            "(a CD is always read-only: attach it as a disk)",
        )


def check_sound(layer: Layer) -> None:
    """Refuse to write to an image that is marked as corrupt, or needs to be repaired.

    :raise UnsupportedError: it is.
    """
    file = printable(layer.file)
    # One that is writable was opened so, and repaired; in use it may well say that it is not
    # closed.
    unclean = layer.node.unclean and layer.node.read_only
    if layer.node.corrupt:
        why = "QEMU has marked it as corrupt, and no VM could be started from it"
    elif unclean:
        why = (
            "it was not closed when its last QEMU ended, and its reference counts may be wrong: "
            "what is written now could land on its data"
        )
    else:
        return
    raise UnsupportedError(
        f"@{layer.depth} {file} must not be written to: {why}",
        standing=UNTOUCHED,
        remedy="stream what it holds into the layer above instead (qmpblock stream); or end the "
        f"VM and repair it: qemu-img check -f {printable(layer.format)} -r all {file}",
    )


def refusal(error: CommandError, layer: Layer, command: Sequence[str]) -> Error:
    """Say in our words why QEMU did not start a job that writes to a layer, and what to do.

    :param command: QEMU's own command line; empty where it is not known.
    """
    said = error.description
    file = printable(layer.file)
    node = layer.storage or layer.node
    name = printable(node.name)
    if "read-only" not in said and "Read-only" not in said and "ermi" not in said:
        error.standing = "nothing was changed"
        return error
    if "Read-only file system" in said:
        remedy = f"the file system of {file} is mounted read-only: mount it for writing"
    elif "Could not open" in said or "Could not reopen" in said:
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
