"""The keys of a VM's encrypted disks: its `secret` objects, read so that qemu-img can use them.

An overlay over an encrypted layer is encrypted with the same object. QEMU tells its properties to
whoever has its monitor; they are handed on in memory (`qmpblock.host.qemuimg.Key`), and are in no
argument, log, journal or message. Whether what a file holds is still what QEMU read from it need
not be known: QEMU opens the overlay with its own key, or refuses to.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qmpblock.address import TCPAddress
from qmpblock.errors import CommandError, NotFoundError, UnsupportedError, printable
from qmpblock.host.handed import HandedFiles, User
from qmpblock.host.processes import end_child
from qmpblock.host.qemuimg import Key

if TYPE_CHECKING:
    from qmpblock.qemu.monitor import Monitor

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
    keys: list[Key] = []
    name = secret
    while name:
        if len(keys) == _LONGEST:
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
                await _read_file(monitor.peer_pid, name, file)
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
        keys.append(Key(text, form, iv))
    return tuple(reversed(keys))


async def _read_file(pid: int | None, name: str, file: str) -> bytes:
    """Read the file of a key as QEMU sees it, with the rights of its user.

    Root's own would tell that user whether a password of theirs is what a file of root's holds.
    """
    where = f"the file {printable(file)} of the key {printable(name)}"
    if pid is None:
        raise UnsupportedError(f"{where} is on the VM's host, not here")
    if _ANOTHER_FOR_US.match(file):
        raise UnsupportedError(f"{where} was an open file of QEMU's own, which only it can read")
    try:
        with HandedFiles(user=User.of_process(pid)) as files:
            here = files.image({"driver": "file", "filename": _here(pid, file)}, said=True)
            text, code = await _output(files, files.command("cat", [here["filename"]]))
    except NotFoundError:
        why = "No such file or directory"
        if not file.startswith("/"):
            why += (
                " where QEMU is now (with -daemonize it leaves the directory in which it was "
                "started: start the VM with the key's absolute path)"
            )
        raise UnsupportedError(f"{where} cannot be read here: {why}") from None
    except UnsupportedError as error:
        raise UnsupportedError(f"{where} cannot be read here: {error.message}") from None
    if code:
        raise UnsupportedError(f"{where} cannot be read here: QEMU's user may not open it")
    if len(text) > _LIMIT:
        raise UnsupportedError(f"{where} has more than {_LIMIT} bytes")
    return text


def _here(pid: int, file: str) -> str:
    """Return the name of a file that a process calls so: the same one, if that leads to it."""
    seen = f"/proc/{pid}/{'root' if file.startswith('/') else 'cwd/'}{file}"
    try:
        start = Path(f"/proc/{pid}/cwd").readlink()
        return str(start / file) if (start / file).samefile(seen) else seen
    except (OSError, ValueError):
        return seen


async def _output(files: HandedFiles, command: Sequence[str]) -> tuple[bytes, int]:
    """Return what a program prints, or more than the limit of it; and how it ended."""
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        pass_fds=files.descriptors,
    )
    assert process.stdout is not None
    text = b""
    try:
        while len(text) <= _LIMIT and (piece := await process.stdout.read(_LIMIT)):
            text += piece
        return text, 0 if len(text) > _LIMIT else await process.wait()
    finally:
        await end_child(process)
