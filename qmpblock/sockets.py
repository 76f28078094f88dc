"""Sockets: connecting to an address."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from pathlib import Path
from typing import Any

from qmpblock.address import Address, MonitorAddress, UnixAddress
from qmpblock.links import walk

__all__ = ["absolute", "open_socket"]

_FULL = 0.02  # seconds between attempts to get into the queue of a listening socket


def absolute(address: MonitorAddress) -> str:
    """Name an address so that another process can tell whether it is the same."""
    if isinstance(address, UnixAddress):
        return f"unix:{os.path.realpath(address.path)}"
    return str(address)


async def open_socket(address: Address) -> socket.socket:
    """Connect a non-blocking stream socket. Cancelling closes it.

    :raise OSError: nothing listens there, or the host is unknown.
    """
    if isinstance(address, UnixAddress):
        return await _connect(socket.AF_UNIX, address.path)
    addresses = await asyncio.get_running_loop().getaddrinfo(
        address.host, address.port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP
    )
    for family, _, _, _, target in addresses[:-1]:
        with contextlib.suppress(OSError):
            return await _connect(family, target)
    return await _connect(addresses[-1][0], addresses[-1][4])


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

    As root to no socket to which a link of another user's leads who could not connect himself: his
    monitor's name would become that of another VM's.

    The event loop's own sock_connect takes EAGAIN for "under way", which on a UNIX socket it never
    is (connect(2)), and says connected.
    """
    pinned = walk(Path(path), os.W_OK, search=True) if os.geteuid() == 0 else -1
    try:
        while True:
            try:
                sock.connect(path if pinned < 0 else f"/proc/self/fd/{pinned}")
            except BlockingIOError:
                await asyncio.sleep(_FULL)
            else:
                return
    finally:
        if pinned >= 0:
            os.close(pinned)
