"""The asyncio end: custody on every path, the stall limit, and an orderly end."""

from __future__ import annotations

import asyncio
import gc
import shutil
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Awaitable, Callable
from pathlib import Path

import fake_server as fake
import pytest

from qmpblock.errors import (
    Error,
    NBDConnectError,
    NBDDisconnectedError,
    NBDProtocolError,
    StalledError,
)
from qmpblock.nbd import Client
from qmpblock.nbd.handshake import State

DISC = b"\x25\x60\x95\x13" + bytes.fromhex("00000002") + bytes(20)
ABORT = b"IHAVEOPT" + bytes.fromhex("0000000200000000")


# -- every way in which a connection ends: what the server does, and then what we do


def impatient(client: Client, stall: float) -> None:
    """Give a client another stall limit: what went before shall not fail by a short one."""
    assert client._link is not None
    clock = client._link._clock
    clock.close()
    clock.limit = stall


async def _serve(server: fake.FakeServer) -> None:
    await server.handshake()


async def _closing(server: fake.FakeServer, polite: bool) -> None:
    client = await Client.connect(server.socket, polite=polite)
    await client.close()


async def _leaving_by_exception(server: fake.FakeServer, polite: bool) -> None:
    with pytest.raises(ZeroDivisionError):
        async with await Client.connect(server.socket, polite=polite):
            raise ZeroDivisionError


async def _cancelled_request(server: fake.FakeServer, polite: bool) -> None:
    client = await Client.connect(server.socket, polite=polite)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await client.flush()
    await client.close()


async def _lie(server: fake.FakeServer) -> None:
    await server.handshake()
    await server.request()
    await server.send(b"?" * 64)


async def _protocol_error(server: fake.FakeServer, polite: bool) -> None:
    async with await Client.connect(server.socket, polite=polite) as client:
        with pytest.raises(NBDProtocolError):
            await client.flush()


async def _mute(server: fake.FakeServer) -> None:
    await server.handshake()
    await server.request()


async def _stalled(server: fake.FakeServer, polite: bool) -> None:
    async with await Client.connect(server.socket, polite=polite) as client:
        impatient(client, 0.1)
        with pytest.raises(StalledError):
            await client.flush()


async def _refuse(server: fake.FakeServer) -> None:
    await server.handshake_before(fake.GO)
    await server.send(fake.option_reply(fake.GO, fake.ERR_UNKNOWN))


async def _refused(server: fake.FakeServer, polite: bool) -> None:
    with pytest.raises(NBDConnectError):
        await Client.connect(server.socket, polite=polite)


async def _lie_early(server: fake.FakeServer) -> None:
    await server.handshake_before(fake.GO)
    await server.send(bytes(20))


async def _handshake_error(server: fake.FakeServer, polite: bool) -> None:
    with pytest.raises(NBDProtocolError):
        await Client.connect(server.socket, polite=polite)


async def _wait_for_go(server: fake.FakeServer) -> None:
    await server.handshake_before(fake.GO)


async def _cancelled_handshake(server: fake.FakeServer, polite: bool) -> None:
    connecting = asyncio.create_task(Client.connect(server.socket, polite=polite))
    while fake.GO not in server.options:  # before, an orderly end were possible
        await asyncio.sleep(0.001)
    connecting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await connecting


async def _stalled_handshake(server: fake.FakeServer, polite: bool) -> None:
    with pytest.raises(StalledError):
        await Client.connect(server.socket, polite=polite, stall=0.1)


ENDS: dict[str, tuple[fake.Script, Callable[[fake.FakeServer, bool], Awaitable[None]]]] = {
    "closing": (_serve, _closing),
    "leaving by an exception": (_serve, _leaving_by_exception),
    "a cancelled request": (_mute, _cancelled_request),
    "a protocol error": (_lie, _protocol_error),
    "a stall": (_mute, _stalled),
    "a refused handshake": (_refuse, _refused),
    "a protocol error in the handshake": (_lie_early, _handshake_error),
    "a cancelled handshake": (_wait_for_go, _cancelled_handshake),
    "a stalled handshake": (_wait_for_go, _stalled_handshake),
}


async def _end(
    name: str, *, polite: bool, custody: bool, goodbye: bytes = b""
) -> tuple[bytes, bool]:
    """Return what the server saw after its script: bytes, and whether the stream ended."""
    script, act = ENDS[name]
    seen, acted = b"", asyncio.Event()

    async def serve(server: fake.FakeServer) -> None:
        nonlocal seen
        await script(server)
        if custody:  # that there is no end is seen after it; a polite one waits for ours
            await acted.wait()
        if goodbye:
            seen = await server.receive(len(goodbye))
        seen += await server.drain(0.15 if custody or goodbye else 60)
        server.hang_up()

    async with fake.FakeServer(serve, custody=custody) as server:
        await act(server, polite)
        acted.set()
    return seen, server.eof


@pytest.mark.parametrize("name", ENDS)
async def test_under_custody_the_server_sees_no_end_and_no_farewell(name: str):
    seen, eof = await _end(name, polite=False, custody=True)
    assert seen == b""
    assert not eof


@pytest.mark.parametrize("name", ENDS)
async def test_an_impolite_end_is_the_close_of_the_socket_and_nothing_else(name: str):
    seen, eof = await _end(name, polite=False, custody=False)
    assert seen == b""
    assert eof


@pytest.mark.parametrize("name", ENDS)
async def test_a_polite_end_says_goodbye_where_the_protocol_allows(name: str):
    goodbye = {
        "closing": DISC,
        "leaving by an exception": DISC,
        "a cancelled request": DISC,
        "a refused handshake": ABORT,
    }
    wanted = goodbye.get(name, b"")
    seen, eof = await _end(name, polite=True, custody=False, goodbye=wanted)
    assert seen == wanted
    assert eof or name in goodbye  # after DISC it is the server that hangs up


def test_under_custody_a_forgotten_client_ends_nothing():
    """A program that leaves its event loop with a client open: garbage, closed by close(2)."""
    server = fake.FakeServer(_serve, custody=True)

    async def connect() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(server.serve())
            group.create_task(Client.connect(server.socket, polite=False))

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        asyncio.run(connect())
        gc.collect()
    assert any("unclosed transport" in str(w.message) for w in caught)
    assert server.socket.fileno() == -1
    assert server.saw_nothing()
    server.close()


def test_no_system_call_shuts_an_impolite_socket_down(tmp_path: Path):
    """Ask the kernel: a whole session under strace, ended in three ways, makes no shutdown(2)."""
    strace = shutil.which("strace")
    if not strace or subprocess.run([strace, "-o", "/dev/null", "true"]).returncode:
        pytest.skip("strace is not installed, or may not trace here")
    program = textwrap.dedent(
        """
        import asyncio, socket, sys
        sys.path.insert(0, sys.argv[1])
        from test_link import ENDS, _end
        async def main():
            for name in ENDS:
                await _end(name, polite=False, custody=True)
            a, b = socket.socketpair()
            if len(sys.argv) > 2:
                a.shutdown(socket.SHUT_WR)  # to see that the trace would show it
            a.close(), b.close()
        asyncio.run(main())
        """
    )
    for more, found in [([], False), (["control"], True)]:
        trace = tmp_path / "trace"
        command = [strace, "-f", "-e", "trace=shutdown", "-o", str(trace), sys.executable, "-c"]
        subprocess.run([*command, program, str(Path(__file__).parent), *more], check=True)
        assert ("shutdown(" in trace.read_text()) is found


# -- stall


async def test_a_server_that_says_nothing_at_all():
    async def script(server: fake.FakeServer) -> None:
        await server.drain(5)

    async with fake.FakeServer(script) as server:
        with pytest.raises(StalledError, match=r"0\.1 seconds while we awaited the greeting"):
            await Client.connect(server.socket, stall=0.1)


async def test_a_handshake_drawn_out_byte_by_byte_stalls():
    async def script(server: fake.FakeServer) -> None:
        for byte in fake.greeting():
            await server.send(bytes([byte]))
            await asyncio.sleep(0.05)

    async with fake.FakeServer(script) as server:
        with pytest.raises(StalledError, match="awaited the greeting"):
            await Client.connect(server.socket, stall=0.2)


async def test_a_server_that_takes_a_long_write_slowly_is_no_stall():
    async def script(server: fake.FakeServer) -> None:
        await server.handshake()
        await server.receive(28)
        for _ in range(24):
            await server.receive(1 << 20)
            await asyncio.sleep(0.1)
        await server.send(fake.simple(1))
        await server.drain()
        server.hang_up()

    settings = fake.Settings(size=1 << 30)
    async with (
        fake.FakeServer(script, settings) as server,
        await Client.connect(server.socket, stall=2) as client,
    ):
        await client.write(0, bytes(24 << 20))


async def test_an_idle_connection_does_not_stall():
    async def script(server: fake.FakeServer) -> None:
        await server.handshake()
        for _ in range(2):
            await server.send(server.success(await server.request()))
        await server.drain()
        server.hang_up()

    async with (
        fake.FakeServer(script) as server,
        await Client.connect(server.socket) as client,
    ):
        await client.flush()
        impatient(client, 0.1)
        await asyncio.sleep(0.3)
        impatient(client, 60)
        await client.flush()


# -- the end, as the user sees it


async def test_the_server_hangs_up_between_and_during_requests():
    async def script(server: fake.FakeServer) -> None:
        await server.handshake()
        await server.request()
        server.hang_up()

    async with fake.FakeServer(script) as server:
        client = await Client.connect(server.socket)
        with pytest.raises(NBDDisconnectedError, match="1 requests in flight"):
            await client.flush()
        with pytest.raises(NBDDisconnectedError):
            await client.flush()
        await client.close()


async def test_each_of_those_who_wait_has_an_exception_of_its_own():
    async def script(server: fake.FakeServer) -> None:
        await server.handshake()
        for _ in range(4):
            await server.request()
        server.hang_up()

    async with fake.FakeServer(script) as server:
        client = await Client.connect(server.socket, in_flight=4)
        async with asyncio.timeout(60):  # none of them waits for ever
            errors = await asyncio.gather(
                *(client.flush() for _ in range(9)), return_exceptions=True
            )
        assert all(isinstance(e, NBDDisconnectedError) for e in errors)
        assert len({id(e) for e in errors}) == 9
        await client.close()


async def test_closing_fails_what_is_in_flight_and_what_waits():
    async def script(server: fake.FakeServer) -> None:
        await server.handshake()
        await server.drain()
        server.hang_up()

    async with fake.FakeServer(script) as server:
        client = await Client.connect(server.socket, in_flight=2)
        requests = [asyncio.create_task(client.flush()) for _ in range(4)]
        await asyncio.sleep(0.05)
        await client.close()
        for request in requests:
            with pytest.raises(NBDDisconnectedError, match="closed by us"):
                await request
        await client.close()


async def test_a_server_that_does_not_hang_up_is_not_waited_for_longer_than_the_stall_limit(
    monkeypatch: pytest.MonkeyPatch,
):
    async def script(server: fake.FakeServer) -> None:
        await server.handshake()
        await closed.wait()

    closed = asyncio.Event()
    monkeypatch.setattr("qmpblock.nbd.client._PATIENCE", 3600)
    async with fake.FakeServer(script) as server:
        client = await Client.connect(server.socket)
        client._stall = 0.1
        await client.close()
        closed.set()
        assert (await server.drain(0), server.eof) == (DISC, True)


async def test_the_state_of_a_connection_that_failed_is_told_in_words():
    assert all(state.value for state in State)
    async with fake.FakeServer(_refuse) as server:
        with pytest.raises(Error) as caught:
            await Client.connect(server.socket, export="disk")
    assert "'disk'" in str(caught.value)


async def test_nobody_listens(tmp_path: Path):
    with pytest.raises(NBDConnectError, match="cannot connect"):
        await Client.connect(str(tmp_path / "none"))
    with pytest.raises(NBDConnectError, match="cannot connect"):
        await Client.connect("127.0.0.1:1")
