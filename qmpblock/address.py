"""Addresses of monitors and NBD servers, and how to connect to one.

::

    /run/vm.qmp   unix:/run/vm.qmp   ./vm.qmp   vm.qmp     a UNIX socket
    host:4444     tcp:host:4444      [::1]:4444            TCP

Without a prefix, a text with a slash, or without a `:PORT` at its end, is a path.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import re
import socket
from dataclasses import dataclass
from typing import Any

from qmpblock.errors import RequestError, printable

__all__ = ["Address", "TCPAddress", "UnixAddress", "absolute", "open_socket", "parse_address"]

_HOST_PORT = re.compile(r"(?:\[(?P<v6>[0-9A-Fa-f:.%\w]+)\]|(?P<host>[^:/\[\]]+)):(?P<port>\d+)")
_SUN_PATH = 107  # sizeof(sockaddr_un.sun_path) - 1, unix(7)
_FULL = 0.02  # seconds between attempts to get into the queue of a listening socket


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


def absolute(address: Address) -> str:
    """Name an address so that another process can tell whether it is the same."""
    if isinstance(address, UnixAddress):
        return f"unix:{os.path.realpath(address.path)}"
    return str(address)


def _unix(text: str, path: str) -> UnixAddress:
    if not path or "\0" in path:
        raise RequestError(f"the address {printable(text)!r} names no socket")
    if len(path.encode()) > _SUN_PATH:
        raise RequestError(
            f"the socket path in {printable(text)} is longer than {_SUN_PATH} bytes",
            remedy="use a relative path from a directory nearer to it, or a symbolic link",
        )
    return UnixAddress(path)


async def open_socket(address: Address) -> socket.socket:
    """Connect a non-blocking stream socket. Cancelling closes it.

    :raise OSError: nothing listens there, or the host is unknown.
    """
    if isinstance(address, UnixAddress):
        return await _connect(socket.AF_UNIX, address.path)
    found = await asyncio.get_running_loop().getaddrinfo(
        address.host, address.port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP
    )
    for family, _, _, _, target in found[:-1]:
        with contextlib.suppress(OSError):
            return await _connect(family, target)
    return await _connect(found[-1][0], found[-1][4])


async def _connect(family: int, target: Any) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        if family == socket.AF_UNIX:
            await _connect_unix(sock, target)
        else:
            await asyncio.get_running_loop().sock_connect(sock, target)
    except BaseException:
        sock.close()
        raise
    return sock


async def _connect_unix(sock: socket.socket, path: str) -> None:
    """Connect; while the listener's queue is full, wait.

    The event loop's own sock_connect takes EAGAIN for "under way", which on a UNIX socket it never
    is (connect(2)), and says connected.
    """
    while True:
        try:
            sock.connect(path)
        except BlockingIOError:
            await asyncio.sleep(_FULL)
        else:
            return
