"""The monitor that libvirt holds, and lends: a `Transport` by its daemon.

Commands, descriptors and events go through it, so it knows of each, and no second monitor is
needed. The descriptors are its connection's: they outlive this process and the daemon's own
restart, and whoever comes next can close them.

A daemon that is restarted comes back to the same QEMU. What was under way then is unknown, unless
it was only a question, which is asked again; what comes after waits for the new daemon.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import Callable, Mapping
from typing import Any

from qmpblock.address import LibvirtAddress
from qmpblock.errors import CommandError, ConnectError, GreetingError, printable
from qmpblock.host.libvirtd import (
    Domain,
    FailedError,
    GoneError,
    NoDomainError,
    NotRunningError,
    Teller,
)
from qmpblock.host.libvirtxml import disk_targets
from qmpblock.host.processes import Peer, start_time
from qmpblock.peerjson import RefusedError, read_json
from qmpblock.qemu.libvirtlender import LibvirtLender
from qmpblock.qemu.transport import Event, LostError

__all__ = ["LibvirtMonitor"]

_AGAIN = 0.2  # seconds between attempts to reach a daemon that has gone
_PATIENCE = 0.9  # of the stall limit: so long it may be gone
_LOOK, _LOOKS = 0.01, 50  # seconds between looks whether QEMU has ended, and how many
_QUESTIONS = ("query-", "qom-get", "qom-list")  # change nothing: may be asked twice


class LibvirtMonitor:
    """A `Transport`: the monitor of a domain, as libvirt's daemon lends it."""

    version: tuple[int, int, int] = (0, 0, 0)
    package = ""
    can_pass_fds = True  # the address is of this host
    by_turns = False
    forward = None

    def __init__(
        self,
        address: LibvirtAddress,
        on_event: Callable[[Event, int], None],
        on_end: Callable[[], None],
    ) -> None:
        self._address = address
        self._on_event = on_event
        self._on_end = on_end
        self._domain: Domain | None = None
        self._peer: Peer | None = None
        self._files: list[int] = []  # that the next command takes along
        self._coming_back: asyncio.Task[None] | None = None
        self._stall = 0.0
        self.ended = ""  # why there is nothing to come back to
        self._closed = False
        self.lender = LibvirtLender(self)

    @property
    def peer_pid(self) -> int | None:
        """QEMU's process, by the daemon's pid file; None: not known."""
        return None if self._peer is None else self._peer.known()

    async def open(self, timeout: float, stall: float) -> None:
        """Reach the daemon and the domain. See `Monitor.connect`."""
        self._stall = stall
        try:
            async with asyncio.timeout(2 * timeout):  # for the daemon, and for QEMU's answer
                self._domain = await Domain.open(self._address, _Teller(self))
                self._peer = self._domain.process()
                said = await self.execute("query-version", None)
        except (TimeoutError, GoneError, LostError) as error:
            await self.close(stall)
            why = getattr(error, "why", "") or str(error) or f"no answer within {2 * timeout:g} s"
            raise ConnectError(
                f"libvirt does not lend the monitor of {self._address}: {why}",
                remedy="look whether its daemon and the domain run (virsh list), and what it is at "
                "work on (virsh domjobinfo DOMAIN)",
            ) from None
        except BaseException:
            await self.close(stall)
            raise
        try:
            major, minor, micro = (int(said["qemu"][one]) for one in ("major", "minor", "micro"))
            self.version, self.package = (major, minor, micro), str(said.get("package", ""))
        except (AttributeError, KeyError, TypeError, ValueError):
            await self.close(stall)
            raise GreetingError(
                f"{self._address} names no QEMU version: {printable(said)}"
            ) from None

    async def close(self, stall: float) -> None:
        """Leave the daemon. Idempotent."""
        self._closed = True
        self._drop_files()
        if self._coming_back is not None:
            self._coming_back.cancel()
            await asyncio.wait([self._coming_back])
        if self._domain is not None:
            self._domain.close()
            self._domain = None

    async def execute(
        self,
        command: str,
        arguments: Mapping[str, object] | None,
        *,
        out_of_band: bool = False,
    ) -> Any:
        """Run a command; see `Transport`."""
        if out_of_band:
            raise CommandError(
                command, arguments, "GenericError", "libvirt's monitor takes nothing out of band"
            )
        words: dict[str, object] = {"execute": command}
        if arguments is not None:
            words["arguments"] = arguments
        text = json.dumps(words)
        while True:
            domain = await self.there()
            files, self._files = self._files, []
            try:
                answer = _read(await domain.command(text, files))
                break
            except GoneError as error:
                if files or not command.startswith(_QUESTIONS):
                    raise self.lost(error) from None
                self.come_back(domain)
            except NotRunningError as error:
                raise self.lost(error) from None
            except FailedError as error:
                raise (await self.ended_by(error) or LostError(str(error))) from None
        if "error" in answer:
            refused = answer["error"]
            raise CommandError(command, arguments, str(refused["class"]), str(refused["desc"]))
        return answer["return"]

    def send_fd(self, fd: int) -> None:
        """Have the next command take a descriptor along."""
        self._drop_files()
        self._files = [os.dup(fd)]

    def keep_turn(self, kept: bool) -> None:
        """Nothing: the daemon has room for others in between, and is asked by them."""

    def keep_unlogged(self, unlogged: bool) -> None:
        """Nothing: this process logs none of it."""

    async def disks_called(self) -> Mapping[str, str]:
        """Return the ids of the disks by libvirt's names of them (`vda`)."""
        domain = await self.there()
        try:
            return disk_targets(await domain.xml())
        except (GoneError, NotRunningError, FailedError, ValueError) as error:
            raise LostError(printable(error)) from None

    def _drop_files(self) -> None:
        for fd in self._files:
            os.close(fd)
        self._files = []

    def lost(self, error: GoneError | NotRunningError) -> LostError:
        """Have it be lost for good, since what was under way may change something, or it ended."""
        if isinstance(error, GoneError):
            self._end(f"libvirt's daemon went away: {error}")
        else:
            self._end(f"the domain has ended: {error}")
        return LostError()

    async def ended_by(self, error: FailedError) -> LostError | None:
        """Return that the domain has ended, where it failed for that; None where it runs.

        libvirt hears that QEMU has closed its socket, and says that and no more, before it knows
        why; a process that is killed closes it a moment before it has ended.
        """
        if self._peer is None or self._peer.start is None:
            return None
        for _ in range(_LOOKS):
            if start_time(self._peer.pid) != self._peer.start:
                return self.lost(NotRunningError(str(error)))
            await asyncio.sleep(_LOOK)
        return None

    async def there(self) -> Domain:
        """Return the domain, by a connection that is not known to have ended.

        :raise LostError: there is none, and will be none.
        """
        if self._coming_back is not None:
            await asyncio.wait([self._coming_back])
        if self._domain is None or self.ended or self._closed:
            raise LostError
        return self._domain

    def come_back(self, lost: Domain) -> None:
        """Begin to connect again, unless that is under way, or done, or to no end."""
        if lost is self._domain and self._coming_back is None and not (self.ended or self._closed):
            self._coming_back = asyncio.create_task(self._connect_again(lost))

    async def _connect_again(self, lost: Domain) -> None:
        lost.close()
        try:
            async with asyncio.timeout(self._stall * _PATIENCE):
                domain = await self._reach()
        except TimeoutError:
            self._end("libvirt's daemon went away and does not come back")
            return
        except NoDomainError:
            self._end("the domain has ended")
            return
        finally:
            self._coming_back = None
        if (domain.uuid, domain.id) != (lost.uuid, lost.id):
            domain.close()
            self._end("the domain has ended")
            return
        self._domain = domain

    async def _reach(self) -> Domain:
        while True:
            try:
                return await Domain.open(self._address, _Teller(self))
            except NoDomainError:
                raise
            except (ConnectError, GoneError):
                pass  # not yet
            await asyncio.sleep(_AGAIN)

    def _end(self, why: str) -> None:
        if not self.ended:
            self.ended = why
            self._on_end()

    def _take_event(self, event: Event, size: int) -> None:
        if not self._closed:
            self._on_event(event, size)


class _Teller(Teller):
    def __init__(self, monitor: LibvirtMonitor) -> None:
        super().__init__()
        self._monitor = monitor

    def event(self, name: str, seconds: int, micros: int, details: str | None) -> None:
        text = (details or "{}").encode()
        with contextlib.suppress(RefusedError):  # events are hints, queries the truth
            data = read_json(text)
            if isinstance(data, dict):
                stamp = {"seconds": seconds, "microseconds": micros}
                event = {"event": str(name), "data": data, "timestamp": stamp}
                self._soon(self._monitor._take_event, event, len(text))

    def gone(self) -> None:
        self._soon(self._look)

    def _look(self) -> None:
        domain = self._monitor._domain
        if domain is not None and domain.tell is self:
            self._monitor.come_back(domain)

    def ended(self) -> None:
        self._soon(self._monitor._end, "the domain has ended")


def _read(text: str) -> dict[str, Any]:
    """Read an answer: an object with `return`, or with an `error` that has `class` and `desc`."""
    try:
        answer = read_json(text.encode("utf-8", "surrogateescape"))
    except RefusedError as error:
        raise LostError(f"it sent what no QEMU sends: {printable(error)}") from None
    if isinstance(answer, dict):
        refused = answer.get("error")
        if "return" in answer or (isinstance(refused, dict) and {"class", "desc"} <= set(refused)):
            return answer
    raise LostError(f"it sent what no QEMU sends: {printable(text)}")
