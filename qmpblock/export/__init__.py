"""NBD exports of nodes inside QEMU, entered and left safely."""

from qmpblock.export.session import (
    LOCK,
    NBDAccess,
    Request,
    check_access,
    clear_dead,
    exports,
    no_exports,
)

__all__ = [
    "LOCK",
    "NBDAccess",
    "Request",
    "check_access",
    "clear_dead",
    "exports",
    "no_exports",
]
