"""A server that is not there to serve: it draws out, it holds on, it makes us remember."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import weakref

import fake_server as fake
import numpy as np
import pytest

from qmpblock.errors import NBDError, StalledError
from qmpblock.extents import blockstatus as module
from qmpblock.mapping import _read_map
from qmpblock.nbd import Client

STALL = 0.2
PATIENCE = 60  # seconds; by itself none of this would end


def _dripping(head: bytes, drop: bytes) -> fake.Script:
    """Begin a reply, then send a drop often enough that the line is never silent."""

    async def script(server: fake.FakeServer) -> None:
        await server.handshake()
        await server.request()
        await server.send(head)
        while True:
            await server.send(drop)
            await asyncio.sleep(STALL / 2)

    return script


_ERROR = fake.chunk(fake.STRUCTURED, 1, fake.ERROR, fake.error_payload(5))
_DRIPS = {
    "data": (
        fake.chunk(fake.STRUCTURED, 1, fake.DATA, fake.data_payload(0, b""), length=8 + 65536),
        b"x",
    ),
    "errors": (b"", _ERROR),
}
# A head comes a byte at a time: its first 20 bytes, then never the payload.
_HEAD = fake.chunk(fake.STRUCTURED, 1, fake.DATA, b"", length=8 + 65536)


@pytest.mark.parametrize("kind", ["data", "errors", "head"])
async def test_drops_are_no_progress(kind: str):
    """The line is never silent for the stall limit, and yet nothing is getting done."""
    sent = 0
    if kind == "head":

        async def script(server: fake.FakeServer) -> None:
            nonlocal sent
            await server.handshake()
            await server.request()
            for byte in _HEAD:
                await server.send(bytes([byte]))
                sent += 1
                await asyncio.sleep(STALL / 2)

    else:
        script = _dripping(*_DRIPS[kind])
    async with (
        fake.FakeServer(script) as server,
        await Client.connect(server.socket, stall=STALL) as client,
    ):
        with pytest.raises(StalledError, match=r"0\.2 seconds"):
            await asyncio.wait_for(client.read(0, 65536), PATIENCE)
    assert sent < len(_HEAD)


async def test_a_server_that_sips_what_we_send_is_no_progress():
    async def script(server: fake.FakeServer) -> None:
        await server.handshake()
        loop = asyncio.get_running_loop()
        while not given_up.is_set():
            await loop.sock_recv(server._own, 16)
            await asyncio.sleep(STALL / 8)

    given_up = asyncio.Event()
    async with fake.FakeServer(script, fake.Settings(size=64 << 20)) as server:
        client = await Client.connect(server.socket, stall=STALL)
        try:
            with pytest.raises(StalledError):
                await asyncio.wait_for(client.write(0, bytes(32 << 20)), PATIENCE)
        finally:
            given_up.set()


async def test_a_slow_server_that_works_is_waited_for():
    """A reply that takes longer than the stall limit, at a rate that does get somewhere."""
    size = 24 * 8192

    async def script(server: fake.FakeServer) -> None:
        await server.handshake()
        request = await server.request()
        head = server.chunk(
            request, fake.DATA, fake.data_payload(0, b""), length=8 + size, done=True
        )
        await server.send(head)
        for _ in range(24):
            await server.send(b"x" * 8192)
            await asyncio.sleep(0.1)

    async with (
        fake.FakeServer(script) as server,
        await Client.connect(server.socket, stall=2) as client,
    ):
        assert await client.read(0, size) == b"x" * size


async def test_requests_that_end_are_progress():
    async def script(server: fake.FakeServer) -> None:
        await server.handshake()
        for _ in range(24):
            request = await server.request()
            await asyncio.sleep(0.1)
            await server.send(server.success(request))

    async with (
        fake.FakeServer(script) as server,
        await Client.connect(server.socket, stall=2) as client,
    ):
        await asyncio.gather(*(client.flush() for _ in range(24)))


@pytest.mark.parametrize("end", ["close", "lie", "hang up"])
async def test_a_closed_connection_is_forgotten_at_once(end: str):
    """Its buffers are not kept until the stall limit is over, which is a minute."""

    async def script(server: fake.FakeServer) -> None:
        await server.handshake()
        await server.request()
        if end == "lie":
            await server.send(b"?" * 64)
        elif end == "hang up":
            server.hang_up()
            return
        await server.drain(1)

    async with fake.FakeServer(script) as server:
        client = await Client.connect(server.socket, stall=60, polite=False)
        reading = asyncio.create_task(client.read(0, 1 << 20))
        await asyncio.sleep(0.05)
        await client.close()
        with contextlib.suppress(NBDError):
            await reading
        forgotten = weakref.ref(client._protocol)
        del client, reading
        await asyncio.sleep(0)
        gc.collect()
        assert forgotten() is None


class _Chatterbox:
    """Describes a disk in as many extents as it can; what `_read_map` wants of a client."""

    max_status_length = 1 << 31

    def __init__(self, size: int, extents: int) -> None:
        self.size = size
        self.block_size = type("Sizes", (), {"minimum": 1})
        self.told = 0
        rows = [(512, flag) for flag in itertools.islice(itertools.cycle((0, 3)), extents)]
        self._base = np.array(rows, np.uint64)
        self._depth = np.array([(512 * extents, 1)], np.uint64)

    async def block_status(self, offset: int, length: int) -> dict[str, object]:
        await asyncio.sleep(0)
        self.told += len(self._base)
        return {"base:allocation": self._base, "qemu:allocation-depth": self._depth}


@pytest.mark.parametrize("extents", [1000, 1])
async def test_the_limit_of_extents_is_of_all_parts_together(
    extents: int, monkeypatch: pytest.MonkeyPatch
):
    """A map is read in four parts; with one extent a reply, each costs more than its bytes."""
    monkeypatch.setattr(module, "MOST_EXTENTS", 100_000)
    server = _Chatterbox(1 << 40, extents)
    with pytest.raises(NBDError, match="more than 100000 extents"):
        await _read_map(server, [server.size], [0], 0, server.size)  # type: ignore[arg-type]
    assert server.told <= 110_000
