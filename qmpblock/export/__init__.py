"""NBD exports of nodes inside QEMU, entered and left safely."""

from qmpblock.export.session import (
    Request,
    check_access,
    clear_dead,
    exports,
    no_exports,
)
from qmpblock.qemu.connection import NBDAccess

__all__ = [
    "NBDAccess",
    "Request",
    "check_access",
    "clear_dead",
    "exports",
    "no_exports",
]
