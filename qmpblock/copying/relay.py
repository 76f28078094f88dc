"""Relay: the one wire between QEMU and the NBD server that a copy goes to, held in our hand.

While a target does not answer, each command that drains its node (stop, system_reset, quit, a
guest's own reboot) holds the monitor and the guest until it does (K24), and QEMU has nothing to end
such a connection: after `yank` it connects again, to a server that takes it and does not answer.
So QEMU connects to a socket of ours, which accepts once and then is no more, and what it and the
server say is passed on. To close both ends is what ends the connection, and the job with it, and
where this process dies, the kernel does so. A descriptor handed over would need no path, but a QEMU
that has lost its connection makes it again, by the number: to whatever has that by then (K25).

The bytes are moved by a thread of its own, inside the kernel (splice(2)): no Python that takes long
keeps a copy waiting, or the stall limit from its turn. They are not looked into, so TLS is QEMU's
own. What is held is bounded by two pipes and the buffers of two sockets, and who does not read
makes the other wait. That of a UNIX socket takes a whole request, and no more: by itself it is a
fifth of one, each of which would take five turns at either end; and what lies in larger ones has
left the processor's cache before it is read, which costs either end a quarter more.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import fcntl
import os
import select
import socket
import termios
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

from qmpblock.address import Address
from qmpblock.errors import UNTOUCHED, Error, NBDConnectError, printable
from qmpblock.host.socketfolder import SocketFolder
from qmpblock.sockets import open_socket

__all__ = ["End", "Relay", "listen", "place_for"]

_PIPE = 1 << 20  # bytes that a pipe holds, where that is allowed (/proc/sys/fs/pipe-max-size)
_BUFFER = 512 << 10  # a UNIX socket takes twice as much, likewise (net.core.wmem_max)
_FLAGS = os.SPLICE_F_MOVE | os.SPLICE_F_NONBLOCK
_NONE = bytes(4)  # an int
_GREETING = b"NBDMAGICIHAVEOPT"  # of every server's, TLS or not


class End(enum.Enum):
    """Why a relay has ended."""

    CUT = "it was cut"
    STALLED = "the NBD server did not answer for longer than the stall limit, so it was cut"
    SERVER = "the NBD server closed its end"
    QEMU = "QEMU closed its end"


class Relay:
    """A wire between QEMU and an NBD server. Made by `open`; its end is final.

    Or between any two connections, by `between`.

    :ivar path: of the socket to which QEMU is to connect, once; empty where it is connected.
    :ivar sent: bytes from QEMU so far; `received`: those from the server.
    :ivar quickest: seconds that the quickest answer of the server's took; None: there was none.
    :ivar patience: seconds for which the server may owe an answer; then the relay cuts itself,
        whatever this process does meanwhile. None: for ever.
    :ivar stays: whether the directory of its socket stays behind, for another one at its path.
    """

    def __init__(
        self,
        server: socket.socket,
        qemu: socket.socket | SocketFolder,
        patience: float | None = None,
    ) -> None:
        self._folder = qemu if isinstance(qemu, SocketFolder) else None
        self._listener = None if self._folder is None else listen(self._folder)
        self._qemu = None if isinstance(qemu, SocketFolder) else qemu
        self.path = "" if self._folder is None else self._folder.socket
        self.sent = 0
        self.received = 0
        self.quickest: float | None = None
        self.patience = patience
        self.stays = False
        self._server = server
        self._heard = time.monotonic()  # when the server last said something
        self._asked: float | None = None  # when QEMU first did since
        self._ended: End | None = None
        self._cut = False
        self._polls: dict[tuple[tuple[int, int], ...], select.poll] = {}
        _enlarge(server)
        if self._qemu is not None:
            _enlarge(self._qemu)
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        # A daemon, for it must not keep a process that ends: that is what cuts the wire.
        self._thread = threading.Thread(target=self._run, name="relay", daemon=True)

    @classmethod
    @asynccontextmanager
    async def open(
        cls, server: Address, *, name: str, user: int | None = None, patience: float | None = None
    ) -> AsyncIterator[Relay]:
        """Connect to a server and wait for its greeting; then wait for QEMU, at `path`.

        Leaving closes both ends and leaves no thread, descriptor or file.

        :param name: of the directory of the socket (`names.wire_node`).
        :param user: as whom QEMU runs, where that is another one than we.
        :param patience: seconds for the greeting, and see the class.
        :raise NBDConnectError: no NBD server answers there; nothing was touched.
        :raise Error: there is no place for the socket.
        """
        sock = await _greeted(server, patience)
        folder = SocketFolder(name)
        try:
            with place_for(folder, user):
                relay = cls(sock, folder, patience)
        except BaseException:
            sock.close()
            folder.remove()
            raise
        relay._thread.start()
        try:
            yield relay
        finally:
            relay._close()

    @classmethod
    @contextmanager
    def between(cls, server: socket.socket, qemu: socket.socket) -> Iterator[Relay]:
        """Pass on what goes through two connections, whatever it is; both are taken over.

        The caller's sockets are closed from then on, to the caller: a number that somebody else
        closes may be another file's by the time the thread uses it. Leaving closes both connections
        and leaves no thread or descriptor.
        """
        relay = cls(_taken_over(server), _taken_over(qemu))
        relay._thread.start()
        try:
            yield relay
        finally:
            relay._close()

    # -- how it stands

    @property
    def ended(self) -> End | None:
        """Why it has ended; None while it lasts."""
        return self._ended

    @property
    def outstanding(self) -> bool:
        """Whether QEMU has said something that the server has not answered by anything.

        Of several requests one may be answered and the others not, after which QEMU says nothing
        more. Only who knows what QEMU waits for can tell that from peace: see `silent_for`.
        """
        return self._ended is None and self._asked is not None

    @property
    def stalled_for(self) -> float:
        """Seconds for which the server has answered nothing since QEMU asked; 0 where none."""
        asked = self._asked
        return 0.0 if asked is None or self._ended is not None else time.monotonic() - asked

    @property
    def silent_for(self) -> float:
        """Seconds since the server last said anything, asked or not; 0 once it has ended."""
        return 0.0 if self._ended is not None else time.monotonic() - self._heard

    @contextmanager
    def within(self, patience: float | None) -> Iterator[None]:
        """Have another patience while this lasts: a short one around what must not hang."""
        before, self.patience = self.patience, patience
        self._nudge()
        try:
            yield
        finally:
            self.patience = before
            self._nudge()

    # -- the end

    def cut(self) -> None:
        """Close both ends, now: once this returns they are closed. Idempotent, and never raises.

        QEMU fails what it has asked for, and the job to that node ends with an error, if it is not
        told to stop or to ignore errors. It takes no lock and some milliseconds at most, so that a
        handler of a signal may call it.
        """
        self._cut = True
        self._nudge()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _close(self) -> None:
        self.cut()
        wake, self._wake = self._wake, -1
        if wake >= 0:
            os.close(wake)
        if self._folder is not None:
            if self.stays:
                self._folder.leave()
            else:
                self._folder.remove()

    def _nudge(self) -> None:
        if self._wake >= 0:
            os.eventfd_write(self._wake, 1)

    # -- the thread

    def _run(self) -> None:
        end = End.CUT
        try:
            end = self._accept() or self._pass_on()
        finally:
            self._ended = end  # before QEMU can hear of it, so that whoever it tells can say why
            for sock in (self._listener, self._qemu, self._server):
                if sock is not None:
                    sock.close()

    def _accept(self) -> End | None:
        """Wait for QEMU; then nobody can connect any more.

        The directory stays: in one that is gone others could put a socket of theirs at its name,
        and a QEMU that has lost this wire connects to it.
        """
        if self._listener is None or self._folder is None:
            return None
        server, listener = self._server.fileno(), self._listener.fileno()
        ready = self._wait(((listener, select.POLLIN), (server, select.POLLRDHUP)))
        if isinstance(ready, End):
            return ready
        if server in ready:
            return End.SERVER
        self._qemu, _ = self._listener.accept()
        self._qemu.setblocking(False)
        _enlarge(self._qemu)
        self._listener.close()
        Path(self._folder.address().path).unlink(missing_ok=True)
        return None

    def _pass_on(self) -> End:
        assert self._qemu is not None  # _accept() went before
        with (
            _Way(self._qemu.fileno(), self._server.fileno()) as there,
            _Way(self._server.fileno(), self._qemu.fileno()) as back,
        ):
            while True:
                # By what is ready alone: to try costs as much as to move something.
                ready = self._wait((there.wanted, back.wanted))
                if isinstance(ready, End):
                    return ready
                if back.wanted[0] in ready:
                    heard = back.move()
                    if heard is None:
                        return back.failed(End.SERVER, End.QEMU)
                    if heard:
                        self._note_heard(heard, held=there.held)
                if there.wanted[0] in ready:
                    said = there.move()
                    if said is None:
                        return there.failed(End.QEMU, End.SERVER)
                    if said:
                        self.sent += said
                        if self._asked is None:
                            self._asked = time.monotonic()

    def _note_heard(self, heard: int, *, held: int) -> None:
        """Take down that the server said something; `held`: what it has not taken yet."""
        self.received += heard
        self._heard = time.monotonic()
        if self._asked is not None:
            took = self._heard - self._asked
            self.quickest = took if self.quickest is None else min(took, self.quickest)
        # What it does not take yet it owes an answer to, and QEMU may send no more.
        self._asked = self._heard if held or self._is_unread() else None

    def _is_unread(self) -> bool:
        """Whether the server, by a UNIX socket, has not read all that was sent to it."""
        if self._server.family != socket.AF_UNIX:
            return False
        return fcntl.ioctl(self._server, termios.TIOCOUTQ, _NONE) != _NONE

    def _wait(self, wanted: tuple[tuple[int, int], ...]) -> set[int] | End:
        """Wait until one of these descriptors is ready, or this is to end."""
        poll = self._polls.get(wanted)
        if poll is None:
            poll = self._polls[wanted] = self._poll_of(wanted)
        while True:
            if self._cut:
                return End.CUT
            patience, left = self.patience, None
            if patience is not None and self._asked is not None:
                left = max(0.0, patience - self.stalled_for)
            # Once more where there is none left: this thread may have had no turn for so long.
            ready = {fd for fd, _ in poll.poll(None if left is None else left and left * 1000 + 1)}
            if self._wake in ready:
                ready.discard(self._wake)
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self._wake)
            elif not ready and left == 0:
                return End.STALLED
            if ready:
                return ready

    def _poll_of(self, wanted: tuple[tuple[int, int], ...]) -> select.poll:
        events = {self._wake: select.POLLIN}
        for fd, event in wanted:  # of one descriptor there may be two
            events[fd] = events.get(fd, 0) | event
        poll = select.poll()
        for fd, event in events.items():
            poll.register(fd, event)
        return poll


class _Way:
    """One direction: a pipe between two sockets, filled and emptied in turns.

    :ivar held: bytes in the pipe.
    """

    def __init__(self, source: int, sink: int) -> None:
        self._source, self._sink = source, sink
        self.held = 0
        self._source_failed = False
        self._out, self._in = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        with contextlib.suppress(PermissionError):  # this user has many large ones
            fcntl.fcntl(self._in, fcntl.F_SETPIPE_SZ, _PIPE)

    def __enter__(self) -> _Way:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._in)
        os.close(self._out)

    @property
    def wanted(self) -> tuple[int, int]:
        """What is waited for now: the descriptor, and its event."""
        if self.held:
            return self._sink, select.POLLOUT
        return self._source, select.POLLIN

    def move(self) -> int | None:
        """Move what can be moved; return how many bytes came, None where either end is no more."""
        came = 0
        try:
            if not self.held:
                self._source_failed = True
                came = os.splice(self._source, self._in, _PIPE, flags=_FLAGS)
                if not came:
                    return None
                self.held = came
            self._source_failed = False
            self.held -= os.splice(self._out, self._sink, self.held, flags=_FLAGS)
        except BlockingIOError:
            pass  # there is none, or no room
        except OSError:
            return None
        return came

    def failed(self, source: End, sink: End) -> End:
        """Return which end it is that is no more."""
        return source if self._source_failed else sink


def _taken_over(sock: socket.socket) -> socket.socket:
    taken = socket.socket(fileno=sock.detach())
    taken.setblocking(False)
    return taken


def _enlarge(sock: socket.socket) -> None:
    """Have a UNIX socket take more at once; of TCP the kernel sees to that itself."""
    if sock.family == socket.AF_UNIX:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)


@contextmanager
def place_for(folder: SocketFolder, user: int | None) -> Iterator[None]:
    """Make the directory in which the body makes a socket for QEMU, or has QEMU make one.

    :param user: as whom QEMU runs, where that is another one than we.
    :raise Error: there is no place for it.
    """
    try:
        folder.make()
        if user is not None and user != os.geteuid() == 0:
            os.chown(folder.path, user, -1)
        yield
    except OSError as error:
        raise Error(
            f"cannot make a socket for QEMU in {folder.path}: {error.strerror}",
            standing=UNTOUCHED,
            remedy="set TMPDIR to a directory that this user may write to, and nobody "
            "else, unless it is sticky as /tmp is (mode 1777)",
        ) from None


def listen(folder: SocketFolder, backlog: int = 1) -> socket.socket:
    """Listen in a directory that was made, where only whose it is can connect.

    :raise OSError: there is no room.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(folder.address().path)
        listener.listen(backlog)
        listener.setblocking(False)
        Path(folder.address().path).chmod(0o666)  # its directory is for one user alone
    except BaseException:
        listener.close()
        raise
    return listener


async def _greeted(server: Address, patience: float | None) -> socket.socket:
    """Connect to a server, and see that one of NBD begins to speak; nothing is read."""
    try:
        async with asyncio.timeout(patience):
            sock = await open_socket(server)
            try:
                begin = await _peek(sock)
            except BaseException:
                sock.close()
                raise
    except TimeoutError:
        raise _none(server, f"no answer in {patience:g} s") from None
    except OSError as error:
        raise _none(server, error.strerror or str(error)) from None
    if not begin or not _GREETING.startswith(begin):
        sock.close()
        said = f"it says {printable(begin)}" if begin else "it closes the connection"
        raise _none(server, f"{said}, as no NBD server does")
    return sock


async def _peek(sock: socket.socket) -> bytes:
    loop, readable = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(sock, readable.set)
    try:
        await readable.wait()
    finally:
        loop.remove_reader(sock)
    return sock.recv(len(_GREETING), socket.MSG_PEEK)


def _none(server: Address, why: str) -> NBDConnectError:
    return NBDConnectError(
        f"no NBD server answers at {printable(server)}: {why}",
        standing=UNTOUCHED,
        remedy="look whether the target names the server that is to have the copy, and it runs",
    )
