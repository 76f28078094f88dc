"""Who is connected to a socket of this host: so that "somebody holds it" can say who.

For UNIX sockets the kernel tells which socket is whose peer (sock_diag(7), unix_diag); for TCP
the two ends name each other in /proc/net/tcp. Whose socket it is, /proc/PID/fd tells, as far as
this user may look. What cannot be seen, on another host say, is not guessed at.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

from qmpblock.address import Address, SSHAddress, UnixAddress

__all__ = ["holders", "is_held"]

# linux/netlink.h, sock_diag.h, unix_diag.h
_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_DUMP = 0x301  # NLM_F_REQUEST | NLM_F_DUMP
_ERROR, _DONE = 2, 3
_HEADER = struct.Struct("=IHHII")
_REQUEST = struct.Struct("=BBHIIIII")  # family, protocol, pad, states, inode, show, 2 cookies
_FOUND = struct.Struct("=BBBBIII")  # family, type, state, pad, inode, 2 cookies
_ATTRIBUTE = struct.Struct("=HH")
_PAIR = struct.Struct("=II")
_SHOW_VFS_AND_PEER = 0x2 | 0x4
_VFS, _PEER = 1, 2
_ESTABLISHED = 1
_ALL = 0xFFFFFFFF


def holders(address: Address | SSHAddress) -> tuple[int, ...]:
    """Return the processes whose connections to a listening socket were accepted; sorted.

    None where there is none, and where that cannot be seen from here.
    """
    if isinstance(address, SSHAddress):
        return ()
    try:
        ends = _unix_ends(address) if isinstance(address, UnixAddress) else _tcp_ends(address.port)
    except (OSError, ValueError, struct.error):
        return ()
    return tuple(sorted(_processes(ends))) if ends else ()


def is_held(address: UnixAddress) -> bool:
    """Whether a connection to a listening socket was accepted, and stands, as far as is seen."""
    try:
        return bool(_unix_ends(address))
    except (OSError, ValueError, struct.error):
        return False


def _unix_ends(address: UnixAddress) -> set[int]:
    """Return the inodes of the sockets at the other ends of accepted connections."""
    bound = Path(address.path).stat()
    peers = set()
    for inode, state, attributes in _unix_sockets():
        if _VFS not in attributes or _PEER not in attributes:
            continue
        path_inode, device = _PAIR.unpack(attributes[_VFS])
        same = (path_inode, os.makedev(device >> 20, device & 0xFFFFF)) == (
            bound.st_ino & _ALL,
            bound.st_dev,
        )
        # One that waits in the queue has no inode yet: nobody holds it.
        if same and state == _ESTABLISHED and inode:
            peers.add(struct.unpack("=I", attributes[_PEER])[0])
    return peers


def _unix_sockets() -> Iterator[tuple[int, int, dict[int, bytes]]]:
    """Yield inode, state and attributes of every UNIX socket of this network namespace."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as netlink:
        netlink.settimeout(1)
        request = _REQUEST.pack(socket.AF_UNIX, 0, 0, _ALL, 0, _SHOW_VFS_AND_PEER, 0, 0)
        size = _HEADER.size + len(request)
        netlink.send(_HEADER.pack(size, _SOCK_DIAG_BY_FAMILY, _DUMP, 1, 0) + request)
        while True:
            data = netlink.recv(1 << 16)
            at = 0
            while at < len(data):
                length, kind, _, _, _ = _HEADER.unpack_from(data, at)
                if kind in (_ERROR, _DONE) or length < _HEADER.size:
                    return
                _, _, state, _, inode, _, _ = _FOUND.unpack_from(data, at + _HEADER.size)
                attributes = data[at + _HEADER.size + _FOUND.size : at + length]
                yield inode, state, dict(_attributes(attributes))
                at += (length + 3) & ~3


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        if length < _ATTRIBUTE.size:
            return
        yield kind, data[at + _ATTRIBUTE.size : at + length]
        at += (length + 3) & ~3


def _tcp_ends(port: int) -> set[int]:
    """Return the inodes of the sockets on this host that are connected to a port of it."""
    rows = []
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
            fields = line.split()
            if int(fields[3], 16) == _ESTABLISHED and fields[9] != "0":
                rows.append((fields[1], fields[2], int(fields[9])))
    # Both ends of such a connection are in the table, each the other's mirror image; the end
    # of the server has our port as its own.
    ours = {(far, near) for near, far, _ in rows if int(near.rpartition(":")[2], 16) == port}
    return {inode for near, far, inode in rows if (near, far) in ours}


def _processes(inodes: set[int]) -> set[int]:
    wanted = {f"socket:[{inode}]" for inode in inodes}
    return {
        int(process.name)
        for process in Path("/proc").iterdir()
        if process.name.isdecimal() and wanted & set(_links(process / "fd"))
    }


def _links(folder: Path) -> Iterator[str]:
    try:
        for entry in folder.iterdir():
            try:
                yield str(entry.readlink())
            except OSError:
                continue  # closed since it was listed
    except OSError:
        return  # ended, or not ours to look at
