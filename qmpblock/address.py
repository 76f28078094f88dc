"""Addresses of monitors and NBD servers. Pure: `qmpblock.sockets` connects to one.

::

    /run/vm.qmp   unix:/run/vm.qmp   ./vm.qmp   vm.qmp     a UNIX socket
    host:4444     tcp:host:4444      [::1]:4444            TCP

Without a prefix, a text with a slash, or without a `:PORT` at its end, is a path.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

from qmpblock.errors import RequestError, printable

__all__ = ["Address", "TCPAddress", "UnixAddress", "parse_address"]

_HOST_PORT = re.compile(r"(?:\[(?P<v6>[0-9A-Fa-f:.%\w]+)\]|(?P<host>[^:/\[\]]+)):(?P<port>\d+)")
_SUN_PATH = 107  # sizeof(sockaddr_un.sun_path) - 1, unix(7)


@dataclass(frozen=True)
class UnixAddress:
    """A UNIX socket, by path."""

    path: str

    def __str__(self) -> str:
        return f"unix:{self.path}"


@dataclass(frozen=True)
class TCPAddress:
    """A TCP host and port."""

    host: str
    port: int

    def __str__(self) -> str:
        return (
            f"tcp:[{self.host}]:{self.port}" if ":" in self.host else f"tcp:{self.host}:{self.port}"
        )

    @property
    def loopback(self) -> bool:
        """Whether the host is this machine by its name alone (no look-up is made)."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


Address = UnixAddress | TCPAddress


def parse_address(text: str) -> Address:
    """Read an address.

    :raise RequestError: it is empty, its port is not in 1..65535, or its path is longer
        than a UNIX socket's may be (107 bytes).
    """
    if text.startswith("unix:"):
        return _unix(text, text[len("unix:") :])
    tcp = text.startswith("tcp:")
    match = _HOST_PORT.fullmatch(text[len("tcp:") :] if tcp else text)
    if match:
        port = int(match["port"])
        if not 1 <= port <= 65535:
            raise RequestError(f"the port in the address {printable(text)} is not in 1..65535")
        return TCPAddress(match["v6"] or match["host"], port)
    if tcp:
        raise RequestError(f"the address {printable(text)} is not tcp:HOST:PORT")
    return _unix(text, text)


def _unix(text: str, path: str) -> UnixAddress:
    if not path or "\0" in path:
        raise RequestError(f"the address {printable(text)!r} names no socket")
    if len(path.encode()) > _SUN_PATH:
        raise RequestError(
            f"the socket path in {printable(text)} is longer than {_SUN_PATH} bytes",
            remedy="use a relative path from a directory nearer to it, or a symbolic link",
        )
    return UnixAddress(path)
