"""QEMU's NBD server and its exports: commands that accept what is already so.

And, made of them, the undoing of what a controller that died left in a VM.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import posixpath
import stat
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qmpblock.address import TCPAddress
from qmpblock.errors import BusyError, CommandError, printable
from qmpblock.host.ourfiles import Directory
from qmpblock.names import credentials_name, export_name, is_of_run, is_socket, listener_name
from qmpblock.qemu.capabilities import Capabilities
from qmpblock.qemu.lock import Holder
from qmpblock.qemu.monitor import Monitor
from qmpblock.sockets import absolute, open_socket

__all__ = [
    "ServerUse",
    "answers",
    "delete_export",
    "delete_object",
    "is_listening",
    "monitor_name",
    "notice_closed",
    "remove_socket",
    "tolerate",
    "undo_dead_run",
]

_log = logging.getLogger(__name__)


async def tolerate(words: str, command: Awaitable[Any]) -> bool:
    """Await a command; False if QEMU refused it with these words."""
    try:
        await command
    except CommandError as error:
        if words not in error.description:
            raise
        return False
    return True


async def delete_export(monitor: Monitor, name: str, stall: float, mode: str = "hard") -> bool:
    """Delete an export and wait until it is gone; False if it was not there.

    The event comes before the reply or after it (F5), and after the reply the
    export may still be shutting down, during which its node counts as used.
    """
    with monitor.subscribe(
        "BLOCK_EXPORT_DELETED", match=lambda event: event["data"].get("id") == name
    ) as deleted:
        try:
            await monitor.execute("block-export-del", {"id": name, "mode": mode})
        except CommandError as error:
            if "not found" in error.description:
                return False
            if "already shutting down" not in error.description:
                raise
        await deleted.get(stall)
    return True


async def delete_object(monitor: Monitor, name: str) -> None:
    """Delete a QOM object, if it is there."""
    await tolerate("not found", monitor.execute("object-del", {"id": name}))


async def notice_closed(monitor: Monitor) -> None:
    """Let QEMU notice the connections that were closed before.

    A command that is sent after the reply to another runs in a later turn of QEMU's main
    loop, and each turn looks at every connection.
    """
    for _ in range(2):
        await monitor.execute("query-version")


def monitor_name(monitor: Monitor) -> str:
    """Name a monitor so that another process can tell whether it is the same."""
    return absolute(monitor.address)


def is_listening(path: str) -> bool:
    """Whether a listening socket that was bound to `path` is still open, unlinked or not."""
    accepts = 0x10000  # __SO_ACCEPTCON, in the flags of /proc/net/unix
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        fields = line.split(maxsplit=7)
        if len(fields) == 8 and fields[7] == path and int(fields[3], 16) & accepts:
            return True
    return False


@dataclass(frozen=True)
class ServerUse:
    """What the holder of the lock of QEMU's NBD server says of its use.

    :ivar exports: their names.
    :ivar path: of the socket of a server of its own; empty on a foreign one.
    :ivar ports: on which a server of its own may listen.
    :ivar monitor: by which it came; `custody`: whether QEMU holds its sockets under names.
    """

    exports: tuple[str, ...]
    path: str
    ports: tuple[int, ...]
    monitor: str
    custody: bool
    more: Mapping[str, Any] = field(default_factory=dict)


async def undo_dead_run(monitor: Monitor, dead: Holder, stall: float, name: str) -> None:
    """Remove everything that the controller `dead` added to QEMU, and log what. Idempotent.

    Where it came by another monitor, its sockets stay in QEMU under names that only that one can
    close.

    :param name: of its lock.
    :raise BusyError: that takes the monitor which the dead controller used.
    :raise RecordError: what it added cannot be read: nothing is touched.
    """
    if dead.is_idle:
        return
    use = dead.says(ServerUse, name)
    _log.warning("undoing what a controller that died left in the VM: %s", dead)
    # Read from QEMU, where anybody with a monitor may have written it: nothing of it is used
    # but names that are ours by their form.
    names = [export_name(dead.run, i) for i in range(len(use.exports[:64]))]
    path = use.path if is_socket(use.path, dead.run) else ""
    # Named descriptors belong to a monitor. On the one that the dead controller came by, a
    # name that is not there was never passed, or was closed by an earlier, interrupted undoing.
    elsewhere = use.monitor != monitor_name(monitor)
    half_open = False
    found, closed, removed, kept = 0, 0, [], []
    for name in names:
        there, had_client = await _delete_dead_export(monitor, name, stall)
        found += there
        if await tolerate("not found", monitor.execute("closefd", {"fdname": name})):
            closed += 1
        elif elsewhere:
            kept.append(name)
            half_open |= not had_client
    removed += _counted(found, "export") + _counted(closed, "connection")
    nodes = await monitor.execute("query-named-block-nodes", {"flat": True})
    ours = [
        name for name in (str(node.get("node-name")) for node in nodes) if is_of_run(name, dead.run)
    ]
    for name in sorted(ours, key=len):  # the name of each begins with that of what is over it
        await monitor.execute("blockdev-del", {"node-name": name})
    removed += _counted(len(ours), "node")
    await tolerate("not found", monitor.execute("closefd", {"fdname": listener_name(dead.run)}))
    # With an export of the dead run there, its server runs. Without, it died between two
    # commands; then its listening socket tells. On a foreign server it has no path.
    listening = is_listening(path)
    if isinstance(monitor.address, TCPAddress):
        listening = listening or await answers(monitor.address.host, use.ports[:16])
    if path and (found or listening):
        hangs = Capabilities(monitor.version).nbd_server_stop_hangs_in_handshake
        if elsewhere and (not found or (hangs and half_open and use.custody)):
            # Stopping a server with a half-open connection would hang this QEMU; and without
            # an export there, the server that runs may be somebody else's by now.
            raise BusyError(
                f"{dead} died before its NBD handshake was complete, and QEMU holds its sockets "
                "under names that only the monitor it came by can close",
                standing=f"the VM is well; removed: {_listed(removed)}; left in it: the dead "
                "controller's NBD server, its sockets, and its lock",
                remedy="run the same command once by the monitor that it came by, "
                f"{printable(use.monitor)}: it removes the rest",
            )
        await notice_closed(monitor)
        if await tolerate("not running", monitor.execute("nbd-server-stop")):
            removed.append("the NBD server")
    await delete_object(monitor, credentials_name(dead.run))
    if path and not is_listening(path):  # another controller's of that run, if it is
        remove_socket(path)
    _log.warning("undone, of what %s left: %s", dead, _listed(removed))
    if kept and use.custody:
        _log.warning(
            "left in the VM until it ends, without harm: the sockets that it may hold under the "
            "names %s; only the monitor that they came by can close them, by closefd: %s",
            " ".join(kept),
            printable(use.monitor),
        )


def _counted(number: int, noun: str) -> list[str]:
    return [f"{number} {noun}{'s' * (number != 1)}"] if number else []


def _listed(removed: Sequence[str]) -> str:
    return ", ".join(removed) or "nothing"


def remove_socket(path: str) -> None:
    """Remove a socket of ours and its directory, and never anything else that is in it.

    The directory may be one that QEMU's user has named: it is no link, and nobody but its owner may
    write to it. So it is ours, or his own, where he could do this himself.
    """
    folder, name = posixpath.split(path)
    above, last = posixpath.split(folder)
    with contextlib.suppress(OSError, ValueError), Directory(above) as directory:
        flags = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(last, flags, dir_fd=directory.fd)
        try:
            if os.fstat(fd).st_mode & 0o022:
                return
            with contextlib.suppress(FileNotFoundError):
                status = os.stat(name, dir_fd=fd, follow_symlinks=False)
                if stat.S_ISSOCK(status.st_mode):
                    os.unlink(name, dir_fd=fd)
        finally:
            os.close(fd)
        os.rmdir(last, dir_fd=directory.fd)


async def answers(host: str, ports: Sequence[object]) -> bool:
    """Whether anything listens on one of these ports."""
    for port in ports:
        if isinstance(port, int) and 0 < port < 65536:
            with contextlib.suppress(OSError, TimeoutError):
                async with asyncio.timeout(1):
                    (await open_socket(TCPAddress(host, port))).close()
                return True
    return False


async def _delete_dead_export(monitor: Monitor, name: str, stall: float) -> tuple[bool, bool]:
    """Delete an export; tell whether it was there, and whether it had a client."""
    try:
        return await delete_export(monitor, name, stall, mode="safe"), False
    except CommandError as error:
        if "in use" not in error.description:
            raise
    return await delete_export(monitor, name, stall), True
