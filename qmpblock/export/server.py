"""QEMU's NBD server and its exports: commands that accept what is already so.

And, made of them, the undoing of what a controller that died left in a VM.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qmpblock.address import TCPAddress
from qmpblock.errors import BusyError, CommandError, StalledError, printable
from qmpblock.host.socketfolder import remove_socket
from qmpblock.names import (
    credentials_name,
    export_name,
    is_forwarded,
    is_of_run,
    is_socket,
    listener_name,
)
from qmpblock.qemu.capabilities import Capabilities
from qmpblock.qemu.lock import Holder
from qmpblock.qemu.monitor import Monitor, Subscription
from qmpblock.qemu.refusals import already_shutting_down, in_use, not_found, not_running, tolerate
from qmpblock.sockets import absolute, open_socket

__all__ = [
    "ServerUse",
    "answers",
    "delete_export",
    "delete_exports",
    "delete_object",
    "delete_objects",
    "handshakes_end",
    "is_connected",
    "is_listening",
    "monitor_name",
    "notice_closed",
    "undo_dead_run",
]

_log = logging.getLogger(__name__)
_ACCEPTS = 0x10000  # __SO_ACCEPTCON, in the flags of /proc/net/unix
_HANDSHAKE = 20.0  # seconds: QEMU gives a handshake ten, from 7.2.14 on
_LOOK = 0.05  # seconds between looks at the connections, or the exports


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
            if not_found(error):
                return False
            if not already_shutting_down(error):
                raise
        await _until_gone(monitor, deleted, {name}, stall)
    return True


async def delete_exports(monitor: Monitor, names: Sequence[str], stall: float) -> None:
    """Delete exports, all at once, as `delete_export` does one; those that are not there are gone.

    :raise CommandError: QEMU refused one; the first. The others are gone, or going.
    """
    left = set(names)
    with monitor.subscribe(
        "BLOCK_EXPORT_DELETED", match=lambda event: event["data"].get("id") in names
    ) as deleted:
        asked = (("block-export-del", {"id": name, "mode": "hard"}) for name in names)
        for name, said in zip(names, await monitor.each(*asked), strict=True):
            if isinstance(said, CommandError):
                if not not_found(said) and not already_shutting_down(said):
                    raise said
                left -= {name} if not_found(said) else set()
        await _until_gone(monitor, deleted, left, stall)


async def _until_gone(
    monitor: Monitor, deleted: Subscription, left: set[str], stall: float
) -> None:
    """Wait for the events of exports that go; where these may be missed, look.

    :raise StalledError: one does not go.
    """
    late = asyncio.get_running_loop().time() + stall
    while left:
        try:
            left.discard((await deleted.get(_LOOK if monitor.by_turns else stall))["data"]["id"])
        except StalledError:
            if not monitor.by_turns or asyncio.get_running_loop().time() > late:
                raise
            left &= {export["id"] for export in await monitor.execute("query-block-exports")}


async def delete_object(monitor: Monitor, name: str) -> None:
    """Delete a QOM object, if it is there."""
    await tolerate(not_found, monitor.execute("object-del", {"id": name}))


async def delete_objects(monitor: Monitor, names: Sequence[str]) -> None:
    """Delete QOM objects at once, as far as they are there.

    :raise CommandError: QEMU refused one; the first.
    """
    for said in await monitor.each(*(("object-del", {"id": name}) for name in names)):
        if isinstance(said, CommandError) and not not_found(said):
            raise said


async def notice_closed(monitor: Monitor) -> None:
    """Let QEMU notice the connections that were closed before.

    A command that is sent after the reply to another runs in a later turn of QEMU's main
    loop, and each turn looks at every connection.
    """
    for _ in range(2):
        await monitor.execute("query-version")


async def handshakes_end(monitor: Monitor, path: str) -> None:
    """Let QEMU end the connections to a server of ours, where it could not be stopped before (K14).

    With no export left those are in their handshakes, to which QEMU gives ten seconds.

    :param path: to which the server's socket was bound; nobody finds it there any more.
    :raise BusyError: one does not end: that of an older QEMU (F16).
    """
    await notice_closed(monitor)
    if not Capabilities(monitor.version).nbd_server_stop_hangs_in_handshake:
        return
    late = asyncio.get_running_loop().time() + _HANDSHAKE
    while is_connected(path):
        if asyncio.get_running_loop().time() > late:
            raise BusyError(
                "a client of the NBD server in this VM has begun a handshake and does not go on; "
                f"to stop the server now would hang QEMU {Capabilities(monitor.version)}",
                standing="its exports are gone; the server runs on, and its lock is left",
                remedy=f"end that client (ss -xp | grep {printable(path)}), then run any map of "
                "this VM: it removes the rest",
            )
        await asyncio.sleep(_LOOK)


def monitor_name(monitor: Monitor) -> str:
    """Name a monitor so that another process can tell whether it is the same."""
    return absolute(monitor.address)


def is_listening(path: str) -> bool:
    """Whether a listening socket that was bound to `path` is still open, unlinked or not."""
    return any(flags & _ACCEPTS for flags in _sockets(path))


def is_connected(path: str) -> bool:
    """Whether a connection that was made to `path` is still open at the server's end."""
    return any(not flags & _ACCEPTS for flags in _sockets(path))


def _sockets(path: str) -> Iterator[int]:
    """Yield the flags of every socket that bears a path, unlinked or not."""
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        fields = line.split(maxsplit=7)
        if len(fields) == 8 and fields[7] == path:
            yield int(fields[3], 16)


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
    run = _DeadRun(monitor, dead, dead.says(ServerUse, name), stall)
    _log.warning("undoing what a controller that died left in the VM: %s", dead)
    await run.remove_exports()
    await run.remove_nodes()
    await run.stop_server()
    run.remove_socket()
    run.tell()


class _DeadRun:
    """All that one use of `exports` left in QEMU; its methods are the steps of undoing that."""

    def __init__(self, monitor: Monitor, dead: Holder, use: ServerUse, stall: float) -> None:
        self._monitor = monitor
        self._dead = dead
        self._use = use
        self._stall = stall
        # Read from QEMU, where anybody with a monitor may have written it: nothing of it is used
        # but names that are ours by their form.
        self._run = dead.run
        self._names = [export_name(dead.run, i) for i in range(len(use.exports[:64]))]
        self._path = use.path if is_socket(use.path, dead.run) else ""  # as on a foreign server
        # Of one on another host, or made from there, only its exports tell that it is ours.
        self._forwarded = is_forwarded(use.path)
        # Named descriptors belong to a monitor. On the one that the dead controller came by, a
        # name that is not there was never passed, or was closed by an earlier, interrupted undoing.
        self._elsewhere = use.monitor != monitor_name(monitor)
        self._exported = False  # whether any export was there
        self._half_open = False  # whether a connection may be that had not come to its export
        self._kept: list[str] = []  # names of sockets that only another monitor can close
        self._removed: list[str] = []

    async def remove_exports(self) -> None:
        """Delete the exports, then close the connections that QEMU holds for us."""
        exports, closed = 0, 0
        for name in self._names:
            there, had_client = await _delete_dead_export(self._monitor, name, self._stall)
            exports += there
            if await self._close(name):
                closed += 1
            elif self._elsewhere:
                self._kept.append(name)
                self._half_open |= not had_client
        self._exported = exports > 0
        self._removed += _counted(exports, "export") + _counted(closed, "connection")

    async def remove_nodes(self) -> None:
        """Remove the nodes that held write permissions."""
        nodes = await self._monitor.execute("query-named-block-nodes", {"flat": True})
        names = [str(node.get("node-name")) for node in nodes]
        ours = [name for name in names if is_of_run(name, self._run)]
        for name in sorted(ours, key=len):  # the name of each begins with that of what is over it
            await self._monitor.execute("blockdev-del", {"node-name": name})
        self._removed += _counted(len(ours), "node")

    async def stop_server(self) -> None:
        """Stop the server, if it is that run's own.

        :raise BusyError: that takes the monitor which the dead controller used, or a client does
            not end its handshake (K14).
        """
        await self._close(listener_name(self._run))
        if self._exported and self._forwarded:
            await notice_closed(self._monitor)
            if await tolerate(not_running, self._monitor.execute("nbd-server-stop")):
                self._removed.append("the NBD server")
        if self._path and (self._exported or await self._is_listening()):
            if self._elsewhere and self._endangers():
                raise BusyError(
                    f"{self._dead} died before its NBD handshake was complete, and QEMU holds its "
                    "sockets under names that only the monitor it came by can close",
                    standing=f"the VM is well; removed: {_listed(self._removed)}; left in it: the "
                    "dead controller's NBD server, its sockets, and its lock",
                    remedy="run the same command once by the monitor that it came by, "
                    f"{printable(self._use.monitor)}: it removes the rest",
                )
            await handshakes_end(self._monitor, self._path)
            if await tolerate(not_running, self._monitor.execute("nbd-server-stop")):
                self._removed.append("the NBD server")
        await delete_object(self._monitor, credentials_name(self._run))

    async def _is_listening(self) -> bool:
        """Whether its server runs although no export of it was there: it died between commands."""
        if is_listening(self._path):
            return True
        address = self._monitor.address
        return isinstance(address, TCPAddress) and await answers(address.host, self._use.ports[:16])

    def _endangers(self) -> bool:
        """Whether to stop the server by another monitor may hang this QEMU, or hit others.

        A half-open connection would hang it; and without an export there, the server that runs
        may be somebody else's by now.
        """
        hangs = Capabilities(self._monitor.version).nbd_server_stop_hangs_in_handshake
        return not self._exported or (hangs and self._half_open and self._use.custody)

    def remove_socket(self) -> None:
        """Remove the socket's path, unless another controller listens there."""
        if self._path and not is_listening(self._path):
            remove_socket(self._path)

    def tell(self) -> None:
        """Log what was removed, and what could not be."""
        _log.warning("undone, of what %s left: %s", self._dead, _listed(self._removed))
        if self._kept and self._use.custody:
            _log.warning(
                "left in the VM until it ends, without harm: the sockets that it may hold under "
                "the names %s; only the monitor that they came by can close them, by closefd: %s",
                " ".join(self._kept),
                printable(self._use.monitor),
            )

    async def _close(self, name: str) -> bool:
        """Close a descriptor that QEMU holds; False if it has none of that name."""
        return await tolerate(not_found, self._monitor.execute("closefd", {"fdname": name}))


def _counted(number: int, noun: str) -> list[str]:
    return [f"{number} {noun}{'s' * (number != 1)}"] if number else []


def _listed(removed: Sequence[str]) -> str:
    return ", ".join(removed) or "nothing"


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
        if not in_use(error):
            raise
    return await delete_export(monitor, name, stall), True
