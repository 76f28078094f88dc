"""NBD client: a sans-I/O protocol core and an asyncio connection.

::

    wire          numbers and codecs
    session       what a handshake settled; which requests are legal
    handshake     greeting and options          replies   what may come back for a request
    transmission  requests in flight
    protocol      all of these behind receive_data / send_* / events_received / data_to_send
    tls           credentials, TLS without I/O  link      asyncio: sockets, TLS, time
    client        Client
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qmpblock.nbd.client import Client
from qmpblock.nbd.session import Limits, Session

if TYPE_CHECKING:
    import ssl
    from pathlib import Path

__all__ = ["Client", "Limits", "Session", "tls_context"]


def tls_context(directory: str | Path, *, username: str | None = None) -> ssl.SSLContext:
    """Load TLS credentials from a directory in QEMU's layout; see `qmpblock.nbd.tls`.

    :raise RequestError: the directory holds no usable credentials.
    :raise UnsupportedError: it holds pre-shared keys, and this Python cannot use them.
    """
    from qmpblock.nbd import tls  # here: ssl takes a while to import and is rarely needed

    return tls.tls_context(directory, username=username)
