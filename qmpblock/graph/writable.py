"""What speaks against writing to an image. Pure.

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

from qmpblock.errors import UNTOUCHED, UnsupportedError, printable
from qmpblock.graph.model import DiskDevice, Layer

__all__ = ["check_disk", "check_sound"]


def check_disk(device: DiskDevice) -> None:
    """Refuse to change a disk that the VM has for reading only.

    Frozen layers are read-only by nature; this is about the active one.

    :raise UnsupportedError: it has.
    """
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
        remedy="stream what it holds into the layer above instead: qmpblock stream ADDRESS DISK "
        "--top LAYER; or end the "
        f"VM and repair it: qemu-img check -f {printable(layer.format)} -r all {file}",
    )
