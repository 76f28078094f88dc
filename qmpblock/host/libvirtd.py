"""libvirt's daemon on this host, and a running domain of its: the only module that imports libvirt.

Its functions block, so those of one domain run in a thread of their own, one after the other; what
it tells by itself (events, a connection that ends) comes by its event loop, in a thread that all
share. An application that has registered an event loop of its own with libvirt must run that.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import stat
import threading
from collections.abc import Callable, Mapping, Sequence
from itertools import chain, pairwise
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

from qmpblock.address import LibvirtAddress
from qmpblock.errors import BusyError, ConnectError, printable, shell_words
from qmpblock.host.libvirtxml import copy_xml, disk_files, snapshot_xml
from qmpblock.host.processes import Peer, command_line, start_time, users_of

__all__ = [
    "Domain",
    "FailedError",
    "GoneError",
    "NoDomainError",
    "NotRunningError",
    "Teller",
]

_T = TypeVar("_T")
_KEEPALIVE = (5, 3)  # seconds between signs of life, and how many may be missed
_BINDING = (
    "install libvirt's Python binding: Debian's python3-libvirt, or pip install "
    "'qmpblock[libvirt]', which builds it with libvirt-dev, pkg-config and a compiler"
)


class NoDomainError(ConnectError):
    """The daemon runs no such domain."""


class GoneError(Exception):
    """The connection to the daemon has ended, or it does not answer."""


class NotRunningError(Exception):
    """The domain does not run any more."""


class FailedError(Exception):
    """The daemon refused or failed, and the connection to it goes on."""


class Domain:
    """A running domain, by one connection to its daemon. Make one with `open`.

    :ivar tell: what is told of it.
    :ivar name: of it; `uuid`, and `id`, by which one start is told from the next.
    """

    def __init__(self, address: LibvirtAddress, tell: Teller) -> None:
        self._address = address
        self.tell = tell
        self._worker = _Worker()
        self._connection: Any = None
        self._domain: Any = None
        self._callbacks: list[tuple[Callable[[Any, int], object], int]] = []
        self.name = ""
        self.uuid = ""
        self.id = -1

    @classmethod
    async def open(cls, address: LibvirtAddress, tell: Teller) -> Domain:
        """Connect to the daemon, find the domain, and listen to what it tells.

        :raise ConnectError: there is no daemon.
        :raise NoDomainError: it has no such domain that runs.
        :raise GoneError: the connection ended at once.
        """
        domain = cls(address, tell)
        try:
            await domain._worker.do(domain._open)
        except BaseException:
            domain.close()
            raise
        return domain

    def _open(self) -> None:
        libvirt = _library()
        try:
            self._connection = libvirt.open(self._address.uri)
        except libvirt.libvirtError as error:
            raise ConnectError(
                f"libvirt does not answer at {self._address.uri}: {_words(error)}",
                remedy="look whether its daemon runs (libvirtd or virtqemud), and this user may "
                "use it (the group libvirt)",
            ) from None
        try:
            self._connection.setKeepAlive(*_KEEPALIVE)
            self._domain = self._find(libvirt)
            self._listen(libvirt)
        except libvirt.libvirtError as error:
            raise GoneError(_words(error)) from None

    def _find(self, libvirt: Any) -> Any:
        asked = self._address.domain
        running = self._connection.listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE)
        found = [one for one in running if asked in (one.name(), one.UUIDString())]
        if not found:
            names = ", ".join(sorted(printable(one.name()) for one in running))
            raise NoDomainError(
                f"libvirt runs no domain {printable(asked)} at {self._address.uri}",
                remedy=f"those that run there: {names or 'none'}",
            )
        [domain] = found
        self.name, self.uuid, self.id = domain.name(), domain.UUIDString(), domain.ID()
        return domain

    def _listen(self, libvirt: Any) -> None:
        import libvirt_qemu

        tell, connection = self.tell, self._connection
        connection.registerCloseCallback(lambda *_: tell.gone(), None)
        lifecycle = connection.domainEventRegisterAny(
            self._domain,
            libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE,
            lambda _, __, event, *___: (
                tell.ended() if event == libvirt.VIR_DOMAIN_EVENT_STOPPED else None
            ),
            None,
        )
        self._callbacks.append((type(connection).domainEventDeregisterAny, lifecycle))
        events = libvirt_qemu.qemuMonitorEventRegister(
            connection,
            self._domain,
            None,
            lambda _, __, event, seconds, micros, details, ___: tell.event(
                event, seconds, micros, details
            ),
            None,
        )
        self._callbacks.append((libvirt_qemu.qemuMonitorEventDeregister, events))

    async def command(self, text: str, files: Sequence[int] = ()) -> str:
        """Have QEMU's monitor take a command in, and return its answer, a refusal too.

        Cancelling leaves the outcome unknown.

        :param files: descriptors that go with it; closed here, when it has been sent.
        :raise BusyError: the daemon is at work on this domain: nothing was sent.
        :raise GoneError: the daemon is gone, NotRunningError: the domain is, FailedError: it
            failed; the outcome is unknown.
        """

        def send() -> str:
            import libvirt_qemu

            try:
                if not files:
                    return str(libvirt_qemu.qemuMonitorCommand(self._domain, text, 0))
                answer, returned = libvirt_qemu.qemuMonitorCommandWithFiles(
                    self._domain, text, list(files), 0
                )
                for file in returned:
                    file.close()
                return str(answer)
            finally:
                for fd in files:
                    os.close(fd)

        return await self._ask(send)

    async def xml(self) -> str:
        """Return libvirt's description of the domain as it runs.

        :raise Error: as of `command`.
        """
        return await self._ask(lambda: str(self._domain.XMLDesc(0)))

    async def remembered(self) -> str | None:
        """Return libvirt's description of the domain as it will start; None: it will not.

        :raise Error: as of `command`.
        """
        libvirt = _library()

        def ask() -> str | None:
            if not self._domain.isPersistent():
                return None
            return str(self._domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE))

        return await self._act(ask)

    async def suspend(self) -> None:
        """Pause the domain. Idempotent.

        Cancelling leaves the outcome unknown.

        :raise Error: as of `command`.
        """
        await self._act(lambda: self._domain.suspend())

    async def resume(self) -> None:
        """Have it go on. Idempotent.

        Cancelling leaves the outcome unknown.

        :raise Error: as of `command`.
        """
        libvirt = _library()

        def ask() -> None:
            if self._domain.state()[0] != libvirt.VIR_DOMAIN_RUNNING:  # which it refuses
                self._domain.resume()

        await self._act(ask)

    async def snapshot(self, overlays: Mapping[str, str]) -> None:
        """Have the domain go on in overlays that are there, all at one point or none.

        Cancelling leaves the outcome unknown.

        :param overlays: qcow2 files by libvirt's names of the disks.
        :raise Error: as of `command`.
        """
        libvirt = _library()
        flags = (
            libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY
            | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA
            | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_REUSE_EXT
            | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_ATOMIC
        )

        def take() -> None:
            others = set(disk_files(self._domain.XMLDesc(0))) - set(overlays)
            self._domain.snapshotCreateXML(snapshot_xml(overlays, others), flags)

        await self._act(take)

    async def pull(self, disk: str, base: str) -> None:
        """Begin to pull a disk's backing images into its active layer, and to drop them.

        Cancelling leaves the outcome unknown.

        :param disk: libvirt's name of it; `base`: of the layer that stays (`vda[3]`), or empty.
        :raise Error: as of `command`.
        """
        await self._act(
            lambda: self._domain.blockRebase(disk, base) if base else self._domain.blockPull(disk)
        )

    async def commit(self, disk: str, base: str, top: str, *, active: bool) -> None:
        """Begin to commit layers of a disk into one below them, and to drop them.

        Cancelling leaves the outcome unknown.

        :param disk: libvirt's name of it; `base`, `top`: of the layers (`vda[3]`).
        :param active: whether `top` is the active one: then the job waits for `pivot`, and where
            it is not, it is refused.
        :raise Error: as of `command`.
        """
        flags = _library().VIR_DOMAIN_BLOCK_COMMIT_ACTIVE if active else 0
        await self._act(lambda: self._domain.blockCommit(disk, base, top, 0, flags))

    async def copy(self, disk: str, image: str, fmt: str, *, top: bool, speed: int) -> None:
        """Begin to copy a disk into an image that is there; the job waits for `pivot` then.

        Cancelling leaves the outcome unknown.

        :param disk: libvirt's name of it.
        :param top: whether it is only what the active layer holds.
        :param speed: bytes a second; 0 is no limit.
        :raise Error: as of `command`.
        """
        libvirt = _library()
        flags = (
            libvirt.VIR_DOMAIN_BLOCK_COPY_REUSE_EXT
            # QEMU's job ends with it; else libvirt refuses where the domain outlives that.
            | libvirt.VIR_DOMAIN_BLOCK_COPY_TRANSIENT_JOB
            | (libvirt.VIR_DOMAIN_BLOCK_COPY_SHALLOW if top else 0)
        )
        limits = {libvirt.VIR_DOMAIN_BLOCK_COPY_BANDWIDTH: speed} if speed else {}
        await self._act(lambda: self._domain.blockCopy(disk, copy_xml(image, fmt), limits, flags))

    async def pivot(self, disk: str) -> None:
        """Have the job on a disk pivot, without waiting until it has.

        Cancelling leaves the outcome unknown.

        :raise Error: as of `command`.
        """
        libvirt = _library()
        flags = libvirt.VIR_DOMAIN_BLOCK_JOB_ABORT_PIVOT | libvirt.VIR_DOMAIN_BLOCK_JOB_ABORT_ASYNC
        await self._act(lambda: self._domain.blockJobAbort(disk, flags))

    async def limit(self, disk: str, speed: int) -> None:
        """Limit the job on a disk to so many bytes a second; 0 is no limit.

        :raise Error: as of `command`.
        """
        flags = _library().VIR_DOMAIN_BLOCK_JOB_SPEED_BANDWIDTH_BYTES
        await self._act(lambda: self._domain.blockJobSetSpeed(disk, speed, flags))

    async def job(self, disk: str) -> tuple[int, int] | None:
        """Return how far libvirt's job on a disk is, and how far it is to go; None: there is none.

        :raise Error: as of `command`.
        """
        found = await self._act(lambda: self._domain.blockJobInfo(disk))
        return (int(found["cur"]), int(found["end"])) if found else None

    async def abort(self, disk: str) -> None:
        """Have libvirt give up its job on a disk, and wait until it has.

        :raise Error: as of `command`.
        """
        await self._act(lambda: self._domain.blockJobAbort(disk))

    async def _act(self, action: Callable[[], _T]) -> _T:
        """Have libvirt do something; that it refuses does not mean that the domain has ended."""
        libvirt = _library()

        def act() -> _T:
            try:
                return action()
            except libvirt.libvirtError as error:
                if error.get_error_code() == libvirt.VIR_ERR_OPERATION_INVALID:
                    with contextlib.suppress(libvirt.libvirtError):
                        if self._domain.isActive():
                            raise FailedError(_words(error)) from None
                raise

        return await self._ask(act)

    async def _ask(self, question: Callable[[], _T]) -> _T:
        libvirt = _library()
        try:
            return await self._worker.do(question)
        except libvirt.libvirtError as error:
            code = error.get_error_code()
            if code == libvirt.VIR_ERR_OPERATION_TIMEOUT:
                raise BusyError(
                    f"libvirt is at work on {printable(self.name)} and lends its monitor to "
                    f"nobody: {_words(error)}",
                    standing="this command was not sent",
                    remedy=f"see what it does: virsh domjobinfo {shell_words([self.name])}",
                ) from None
            if error.get_error_domain() == libvirt.VIR_FROM_RPC or not self._connection.isAlive():
                raise GoneError(_words(error)) from None
            if code in (libvirt.VIR_ERR_OPERATION_INVALID, libvirt.VIR_ERR_NO_DOMAIN):
                raise NotRunningError(_words(error)) from None
            raise FailedError(_words(error)) from None

    def process(self) -> Peer | None:
        """Return its QEMU, by the pid file that the daemon keeps; None where that is not to be had.

        The number is believed where only root, or this very user, can have written it, and the
        process was started for this domain.
        """
        state = _state_directory(self._address)
        folders = (state / "qemu", state / "qemu" / "run")
        for file in chain(
            (folder / f"{self.name}.pid" for folder in folders),
            # libvirt 9 escapes what XML would in the name of that file, such as `&`.
            *(folder.glob("*.pid") for folder in folders),
        ):
            try:
                if not _is_trusted(file):
                    continue
                pid = int(file.read_text())
                if ("-uuid", self.uuid) not in _pairs(command_line(pid)):
                    continue
                return Peer(pid, users_of(pid)[0], start_time(pid))
            except (OSError, ValueError):
                continue
        return None

    def close(self) -> None:
        """Leave the daemon. Idempotent; does not wait for it."""

        def leave() -> None:
            connection, self._connection = self._connection, None
            if connection is None:
                return
            with contextlib.suppress(_library().libvirtError):  # it is gone already
                for deregister, number in self._callbacks:
                    deregister(connection, number)
                connection.unregisterCloseCallback()
            with contextlib.suppress(_library().libvirtError):
                connection.close()

        self._worker.end(leave)


class Teller:
    """What a domain's thread tells the event loop that it was made in. Override what is wanted."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()

    def _soon(self, function: Callable[..., None], *arguments: object) -> None:
        with contextlib.suppress(RuntimeError):  # that loop has ended: nobody listens any more
            self._loop.call_soon_threadsafe(function, *arguments)

    def event(self, name: str, seconds: int, micros: int, details: str | None) -> None:
        """Take an event of QEMU's."""

    def gone(self) -> None:
        """Take that the connection to the daemon has ended."""

    def ended(self) -> None:
        """Take that the domain has."""


class _Worker:
    """A thread in which what blocks is done, in order. It never keeps the program from ending."""

    def __init__(self) -> None:
        self._todo: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        threading.Thread(target=self._run, name="libvirt-calls", daemon=True).start()

    def _run(self) -> None:
        while (what := self._todo.get()) is not None:
            what()

    async def do(self, function: Callable[[], _T]) -> _T:
        """Have it done. Cancelling does not wait for it; it will be done all the same."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[_T] = loop.create_future()

        def give(result: _T | None, error: BaseException | None) -> None:
            if future.cancelled():
                return
            if error is None:
                future.set_result(result)  # type: ignore[arg-type]
            else:
                future.set_exception(error)

        def work() -> None:
            result, failed = None, None
            try:
                result = function()
            except BaseException as error:
                failed = error
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(give, result, failed)

        self._todo.put(work)
        return await future

    def end(self, last: Callable[[], None]) -> None:
        """Have a last thing done, and no more. Idempotent."""
        self._todo.put(last)
        self._todo.put(None)


_started = threading.Lock()
_loop_runs = False


def _library() -> Any:
    """Return libvirt's module, its event loop running.

    :raise ConnectError: it is not installed.
    """
    global _loop_runs
    try:
        import libvirt
    except ImportError:
        raise ConnectError("libvirt's Python binding is not installed", remedy=_BINDING) from None
    with _started:
        if not _loop_runs:
            libvirt.registerErrorHandler(lambda *_: None, None)  # else it prints each one
            libvirt.virEventRegisterDefaultImpl()
            threading.Thread(target=_run_loop, name="libvirt-events", daemon=True).start()
            _loop_runs = True
    return libvirt


def _run_loop() -> None:
    import libvirt

    while True:
        libvirt.virEventRunDefaultImpl()


def _words(error: Any) -> str:
    return printable(error.get_error_message())


def _state_directory(address: LibvirtAddress) -> Path:
    """Return where the daemon keeps what is of this boot: beside its socket."""
    if address.socket is not None:
        return Path(address.socket).parent
    if "///system" in address.uri:
        return Path("/run/libvirt")
    return Path(os.environ.get("XDG_RUNTIME_DIR", f"/run/user/{os.geteuid()}")) / "libvirt"


def _is_trusted(path: Path) -> bool:
    """Whether nobody but root and this user can have made a file, or a link on the way to it."""
    for part in (path, *path.absolute().parents):
        status = part.lstat()
        writable = status.st_mode & stat.S_IWOTH and not status.st_mode & stat.S_ISVTX
        if status.st_uid not in (0, os.geteuid()) or (writable and not part.is_symlink()):
            return False
    return True


def _pairs(words: Sequence[str]) -> set[tuple[str, str]]:
    return set(pairwise(words))
