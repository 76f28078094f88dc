"""Way: by which network disks and memory go, with what both VMs are connected with."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from qmpblock.copying.target import Credentials
from qmpblock.copying.wire import credentials_in
from qmpblock.errors import UNTOUCHED, UnsupportedError
from qmpblock.migration.over import Over, read_over

if TYPE_CHECKING:
    from qmpblock.migration.diskterms import DiskTerms
    from qmpblock.qemu.connection import NBDAccess

__all__ = ["check_seen", "way_over"]


def way_over(over: str, here: NBDAccess, there: NBDAccess) -> Over:
    """Return the way that is named so, with what either VM is connected with.

    :raise RequestError: it cannot be; nothing was touched.
    """
    mine = None if here.tls_creds is None else credentials_in(here.tls_creds)
    theirs = None if there.tls_creds is None else Credentials(there.tls_creds)
    if mine is not None and theirs is not None:
        theirs = replace(theirs, kind=mine.kind)  # of what lies there nothing can be seen
    return read_over(over, mine, theirs, insecure=here.insecure and there.insecure)


def check_seen(terms: DiskTerms, way: Over | None) -> None:
    """Refuse what has to be asked of the destination's images where they cannot be asked.

    :raise UnsupportedError: which; nothing was touched.
    """
    asked = terms.layers == "top" or terms.allocation == "full"
    if asked and way is not None and way.here is not None:
        raise UnsupportedError(
            "what the destination's images hold, as has to be known for active layers alone, or "
            "for host space for all of them, is not seen through TLS (--over nbds://)",
            standing=UNTOUCHED,
            remedy="leave --over out, to have disks and memory go by ssh; or copy all layers, thin",
        )
