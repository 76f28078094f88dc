"""The keys of a VM's encrypted disks: its `secret` objects, read so that qemu-img can use them.

An overlay over an encrypted layer is encrypted with the same object. QEMU tells its properties
to whoever has its monitor; they are handed on in memory (`qmpblock.qemuimg.Key`), and are in no
argument, log, journal or message. Whether what a file holds is still what QEMU read from it
need not be known: QEMU opens the overlay with its own key, or refuses to.
"""

from __future__ import annotations

import os
import re
import stat
from typing import TYPE_CHECKING

from qmpblock.address import TCPAddress
from qmpblock.errors import CommandError, UnsupportedError, printable
from qmpblock.qemuimg import Key

if TYPE_CHECKING:
    from qmpblock.monitor import Monitor

__all__ = ["read_keys"]

_LONGEST = 8  # keys that encrypt one another
_LIMIT = 1 << 20  # bytes of a key
_ANOTHER_FOR_US = re.compile(r"/(dev/(fd|std)|proc/(self|thread-self)(/|$))")


async def read_keys(monitor: Monitor, secret: str) -> tuple[Key, ...]:
    """Return a key, after those that encrypt it: as many as that takes, mostly none.

    :param secret: the id of the `secret` object.
    :raise UnsupportedError: it cannot be had; the message says why.
    """
    if isinstance(monitor.address, TCPAddress) and not monitor.address.loopback:
        raise UnsupportedError(
            f"the key {printable(secret)} would cross the network to {monitor.address} in the clear"
        )
    found: list[Key] = []
    name = secret
    while name:
        if len(found) == _LONGEST:
            raise UnsupportedError(f"more than {_LONGEST} keys encrypt {printable(secret)}")
        path = f"/objects/{name}"
        try:
            kind = await monitor.read_key(path, "type")
            if kind != "secret":
                raise UnsupportedError(
                    f"the key {printable(name)} is an object of type {printable(kind)}, which only "
                    "QEMU itself can read"
                )
            file = await monitor.read_key(path, "file")
            text = (
                _read_file(monitor.peer_pid, name, file)
                if file
                else (await monitor.read_key(path, "data")).encode()
            )
            form = await monitor.read_key(path, "format")
            name, iv = await monitor.read_key(path, "keyid"), await monitor.read_key(path, "iv")
        except CommandError as error:
            raise UnsupportedError(
                f"QEMU does not tell the key {printable(name)}: {printable(error.description)}"
            ) from None
        # They become words of a command line.
        if form not in ("raw", "base64") or not re.fullmatch(r"[A-Za-z0-9+/=]*", iv):
            raise UnsupportedError(f"how the key {printable(secret)} is written cannot be told")
        found.append(Key(text, form, iv))
    return tuple(reversed(found))


def _read_file(pid: int | None, name: str, file: str) -> bytes:
    """Read the file of a key as QEMU sees it."""
    where = f"the file {printable(file)} of the key {printable(name)}"
    if pid is None:
        raise UnsupportedError(f"{where} is on the VM's host, not here")
    if _ANOTHER_FOR_US.match(file):
        raise UnsupportedError(f"{where} was an open file of QEMU's own, which only it can read")
    base = "root" if file.startswith("/") else "cwd/"
    try:
        fd = os.open(f"/proc/{pid}/{base}{file}", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with os.fdopen(fd, "rb") as opened:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise UnsupportedError(f"{where} is no regular file, and can be read only once")
            text = opened.read(_LIMIT + 1)
    except OSError as error:
        raise UnsupportedError(f"{where} cannot be read here: {error.strerror}") from None
    if len(text) > _LIMIT:
        raise UnsupportedError(f"{where} has more than {_LIMIT} bytes")
    return text
