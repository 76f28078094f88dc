"""The relay between QEMU and an NBD server: what it passes on, and its ends."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from qmpblock.address import TCPAddress, UnixAddress
from qmpblock.copying.relay import End, Relay
from qmpblock.errors import Error, NBDConnectError
from qmpblock.names import new_run, wire_node

GREETING = b"NBDMAGICIHAVEOPT\0\3"
MIB = 1 << 20


class Server:
    """A socket that greets whoever connects, and does nothing else by itself."""

    def __init__(self, family, place, greeting=GREETING):
        self.listener = socket.socket(family)
        self.listener.bind(place)
        self.listener.listen()
        self.sock = None
        self._thread = threading.Thread(target=self._greet, args=(greeting,), daemon=True)
        self._thread.start()

    def _greet(self, greeting):
        try:
            self.sock, _ = self.listener.accept()
        except OSError:
            return  # nobody came
        self.sock.settimeout(60)
        if greeting is None:
            self.sock.close()
        else:
            self.sock.sendall(greeting)

    @property
    def address(self):
        name = self.listener.getsockname()
        return UnixAddress(name) if isinstance(name, str) else TCPAddress(*name)

    def close(self):
        self.listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self.listener.close()
        if self.sock is not None:
            self.sock.close()


@pytest.fixture(params=["unix", "tcp"])
def server(request, tmp_path):
    unix = (socket.AF_UNIX, str(tmp_path / "server"))
    server = Server(*(unix if request.param == "unix" else (socket.AF_INET, ("127.0.0.1", 0))))
    yield server
    server.close()


@asynccontextmanager
async def relaying(server, **more):
    """Yield a relay, and QEMU's end, which has read the greeting; then look what is left."""
    fds = len(os.listdir("/proc/self/fd"))
    with socket.socket(socket.AF_UNIX) as qemu:
        async with Relay.open(server.address, name=wire_node(new_run(), 0), **more) as relay:
            folder = Path(relay.path).parent
            assert folder.stat().st_mode & 0o777 == 0o700
            qemu.settimeout(60)
            qemu.connect(relay.path)
            assert await read(qemu, len(GREETING)) == GREETING
            yield relay, qemu
        assert not folder.exists()
        assert relay.ended is not None
    if server.sock is not None:
        server.sock.close()
    assert not [one for one in threading.enumerate() if one.name == "relay"]
    assert len(os.listdir("/proc/self/fd")) == fds


async def read(sock, count):
    """Return as many bytes, or what came before the end, which a reset is, too."""

    def all_of_it():
        data = bytearray()
        while len(data) < count:
            try:
                part = sock.recv(min(MIB, count - len(data)))
            except ConnectionResetError:  # what was sent had not been taken when it was cut
                break
            if not part:
                break
            data += part
        return bytes(data)

    return await asyncio.to_thread(all_of_it)


async def until(seen):
    async with asyncio.timeout(60):
        while not seen():
            await asyncio.sleep(0.005)


async def test_bytes_go_both_ways(server):
    async with relaying(server) as (relay, qemu):
        there, back = os.urandom(5 * MIB + 3), os.urandom(3 * MIB + 1)
        sending = asyncio.to_thread(qemu.sendall, there)
        answering = asyncio.to_thread(server.sock.sendall, back)
        _, _, said, heard = await asyncio.gather(
            sending, answering, read(server.sock, len(there)), read(qemu, len(back))
        )
        assert said == there
        assert heard == back
        # Its thread counts what it has moved, which may have been read by then.
        wanted = len(there), len(GREETING) + len(back)
        await until(lambda: (relay.sent, relay.received) == wanted)
        assert relay.ended is None


async def test_who_does_not_read_makes_the_other_wait(server):
    async with relaying(server) as (relay, qemu):
        qemu.setblocking(False)
        put, quiet = 0, 0
        while quiet < 20:  # nothing more was taken, for a while
            try:
                put += qemu.send(bytes(MIB))
                quiet = 0
            except BlockingIOError:
                quiet += 1
                await asyncio.sleep(0.02)
        assert relay.sent <= put < 16 * MIB
        used = time.process_time()
        await asyncio.sleep(0.3)
        assert time.process_time() - used < 0.1  # it waits, and does not turn in a circle
        assert len(await read(server.sock, put)) == put


async def test_it_accepts_once_and_its_directory_stays_to_the_end(server):
    """In one that is gone others could put a socket of theirs at that name."""
    async with relaying(server) as (relay, _):
        assert Path(relay.path).parent.is_dir()
        with socket.socket(socket.AF_UNIX) as late, pytest.raises(FileNotFoundError):
            late.connect(relay.path)


@pytest.mark.parametrize("who", ["qemu", "server"])
async def test_when_one_end_closes_the_other_hears_it(server, who):
    async with relaying(server) as (relay, qemu):
        one, other = (qemu, server.sock) if who == "qemu" else (server.sock, qemu)
        one.sendall(b"last words")
        one.close()
        assert await read(other, 100) == b"last words"
        await until(lambda: relay.ended)
        assert relay.ended is (End.QEMU if who == "qemu" else End.SERVER)
        relay.cut()
        assert relay.ended is not End.CUT


async def test_cut_is_at_once_and_again(server):
    async with relaying(server) as (relay, qemu):
        qemu.sendall(bytes(100))
        relay.cut()
        assert relay.ended is End.CUT, "when it returns"
        assert await read(qemu, 1) == b""
        relay.cut()
    relay.cut()


async def test_cut_by_a_signal_while_much_is_under_way(server):
    async with relaying(server) as (relay, qemu):
        stop = threading.Event()

        def flood():
            try:
                while not stop.is_set():
                    qemu.sendall(bytes(MIB))
            except OSError:
                stop.set()

        flooding, sink = asyncio.to_thread(flood), asyncio.to_thread(drain, server.sock)
        both = asyncio.gather(flooding, sink)
        await until(lambda: relay.sent > 20 * MIB)
        before = signal.signal(signal.SIGUSR1, lambda *_: relay.cut())
        try:
            signal.raise_signal(signal.SIGUSR1)
        finally:
            signal.signal(signal.SIGUSR1, before)
        assert relay.ended is End.CUT
        await both
        assert stop.is_set()


def drain(sock):
    try:
        while sock.recv(MIB):
            pass
    except OSError:
        pass  # a reset: it was cut


async def test_a_stall_is_told_and_cut_even_while_this_process_is_busy(server):
    async with relaying(server) as (relay, qemu):
        with relay.within(0.1):
            await asyncio.sleep(0.3)
            assert relay.ended is None, "nobody asked for anything"
        assert (relay.outstanding, relay.stalled_for) == (False, 0)
        assert relay.silent_for > 0.2
        qemu.sendall(b"request")
        await until(lambda: relay.outstanding)
        assert await read(server.sock, len(b"request")) == b"request"
        server.sock.sendall(b"answer")
        assert await read(qemu, 6) == b"answer"
        await until(lambda: not relay.outstanding)
        began = time.monotonic()
        qemu.sendall(b"request")
        await until(lambda: relay.stalled_for > 0.1)
        assert relay.stalled_for <= time.monotonic() - began
        assert relay.ended is None
        with relay.within(0.3):
            deadline = time.monotonic() + 60
            while relay.ended is None and time.monotonic() < deadline:
                time.sleep(0.01)  # the event loop stands still
        assert relay.ended is End.STALLED
        assert (relay.outstanding, relay.stalled_for, relay.silent_for) == (False, 0, 0)
        assert await read(qemu, 1) == b""


async def test_a_server_that_answers_and_then_takes_no_more_is_stalled(server):
    """QEMU's next words do not get as far as the relay then."""
    async with relaying(server) as (relay, qemu):
        qemu.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                qemu.send(bytes(MIB))
                await asyncio.sleep(0.01)
        server.sock.sendall(b"answer")
        await until(lambda: relay.received > len(GREETING))
        assert relay.outstanding
        with relay.within(0.2):
            await until(lambda: relay.ended)
        assert relay.ended is End.STALLED


async def test_what_a_server_has_not_read_it_owes_an_answer_to(server):
    """However much a socket holds: QEMU may say no more."""
    if server.listener.family != socket.AF_UNIX:
        pytest.skip("only of a UNIX socket the kernel tells")
    async with relaying(server) as (relay, qemu):
        qemu.sendall(bytes(MIB))
        await until(lambda: relay.sent == MIB)
        server.sock.sendall(b"answer")
        assert await read(qemu, 6) == b"answer"
        assert relay.outstanding
        with relay.within(0.2):
            await until(lambda: relay.ended)
        assert relay.ended is End.STALLED


async def test_what_it_took_over_nobody_else_closes():
    """The number of a socket that was closed beside it is another file's by then."""
    (server, theirs), (qemu, ours) = socket.socketpair(), socket.socketpair()
    with theirs, ours, Relay.between(server, qemu) as relay:
        assert (server.fileno(), qemu.fileno()) == (-1, -1)
        server.close()
        qemu.close()
        with socket.socket(), socket.socket():  # which have these numbers, if they are free
            ours.sendall(b"there")
            assert await asyncio.to_thread(theirs.recv, 5) == b"there"
            theirs.sendall(b"back")
            assert await asyncio.to_thread(ours.recv, 4) == b"back"
        assert relay.ended is None
        relay.cut()
        assert (relay.ended, ours.recv(1), theirs.recv(1)) == (End.CUT, b"", b"")


async def test_another_patience_for_a_while(server):
    async with relaying(server) as (relay, qemu):
        qemu.sendall(b"request")
        await asyncio.sleep(0.3)
        with relay.within(60):
            await asyncio.sleep(0.1)
        assert (relay.ended, relay.patience) == (None, None)
        with relay.within(0.2):
            await until(lambda: relay.ended)
        assert relay.ended is End.STALLED


@pytest.mark.parametrize(
    ("greeting", "patience", "words"),
    [
        (b"SSH-2.0\r\n", 60, "it says"),
        (None, 60, "closes the connection"),
        (b"", 0.2, "no answer in 0.2 s"),
    ],
)
async def test_what_is_no_nbd_server(tmp_path, greeting, patience, words):
    fds = os.listdir("/proc/self/fd")
    server = Server(socket.AF_UNIX, str(tmp_path / "s"), greeting)
    with pytest.raises(NBDConnectError, match=words) as caught:
        async with Relay.open(server.address, name=wire_node(new_run(), 0), patience=patience):
            pytest.fail("there is a relay")
    assert caught.value.standing == "nothing was touched"
    server.close()
    with pytest.raises(NBDConnectError, match="No such file"):
        async with Relay.open(UnixAddress(str(tmp_path / "none")), name=wire_node(new_run(), 0)):
            pytest.fail("there is a relay")
    assert len(os.listdir("/proc/self/fd")) == len(fds)


async def test_a_server_that_goes_before_qemu_comes(server):
    async with Relay.open(server.address, name=wire_node(new_run(), 0)) as relay:
        server.sock.close()
        await until(lambda: relay.ended)
        assert relay.ended is End.SERVER
    assert not Path(relay.path).parent.exists()


async def test_nowhere_to_put_the_socket(server, tmp_path, monkeypatch):
    name = wire_node(new_run(), 0)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / name).mkdir()
    with pytest.raises(Error, match="File exists"):
        async with Relay.open(server.address, name=name):
            pytest.fail("there is a relay")
    assert (tmp_path / name).is_dir(), "it was somebody else's"


KILLED = """
import asyncio, sys
from qmpblock.address import UnixAddress
from qmpblock.copying.relay import Relay
async def main():
    async with Relay.open(UnixAddress(sys.argv[1]), name=sys.argv[2]) as relay:
        print(relay.path, flush=True)
        {end}
asyncio.run(main())
"""


@pytest.mark.parametrize("how", ["killed", "ends by itself"])
async def test_its_process_is_no_more(server, how):
    if isinstance(server.address, TCPAddress):
        pytest.skip("the same")
    end = (
        "await asyncio.sleep(60)" if how == "killed" else "sys.stdin.read(); import os; os._exit(0)"
    )
    command = [sys.executable, "-c", KILLED.format(end=end), server.address.path]
    with (
        subprocess.Popen(
            [*command, wire_node(new_run(), 0)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as process,
        socket.socket(socket.AF_UNIX) as qemu,
    ):
        try:
            path = (await asyncio.to_thread(process.stdout.readline)).decode().strip()
            qemu.settimeout(60)
            qemu.connect(path)
            assert await read(qemu, len(GREETING)) == GREETING
            process.kill() if how == "killed" else process.stdin.close()
            assert await read(qemu, 1) == b""
        finally:
            process.kill()
    assert os.listdir(Path(path).parent) == []
    Path(path).parent.rmdir()
