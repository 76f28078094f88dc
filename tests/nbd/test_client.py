"""The client: many requests from many tasks, splitting, cancellation, properties."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import fake_server as fake
import pytest

from qmpblock.errors import (
    NBDProtocolError,
    NBDRequestError,
    RangeError,
    RequestError,
    UnsupportedError,
)
from qmpblock.nbd import Client

BASE, DEPTH = "base:allocation", "qemu:allocation-depth"


@asynccontextmanager
async def _connected(
    script: fake.Script, settings: fake.Settings | None = None, **more: object
) -> AsyncIterator[tuple[fake.FakeServer, Client]]:
    """Connect to a server that shakes hands, runs `script`, and hangs up after DISC."""

    async def serve(server: fake.FakeServer) -> None:
        await server.handshake()
        await script(server)
        await server.drain()
        server.hang_up()

    settings = settings or fake.Settings()
    contexts = list(settings.contexts.values())
    async with (
        fake.FakeServer(serve, settings) as server,
        await Client.connect(server.socket, contexts=contexts, **more) as client,  # type: ignore[arg-type]
    ):
        yield server, client


class _Disk:
    """A script: an honest disk in memory, which answers when and in what order it likes."""

    def __init__(self, size: int, seed: int = 0) -> None:
        self.data = bytearray(random.Random(seed).randbytes(size))
        self.most = 0
        self.requests: list[fake.Request] = []
        self._random = random.Random(seed)

    async def __call__(self, server: fake.FakeServer) -> None:
        pending: list[fake.Request] = []
        asked = asyncio.ensure_future(server.request())
        while True:
            # One that has come in part is not given up.
            if not (await asyncio.wait({asked}, timeout=0.02 if pending else None))[0]:
                self._random.shuffle(pending)
                replies = [self._reply(server, r) for r in pending]
                pending.clear()
                await server.send(b"".join(self._interleave(replies)))
                continue
            request = asked.result()
            asked = asyncio.ensure_future(server.request())
            if request.command == fake.DISC:
                asked.cancel()
                server.hang_up()
                raise fake.Hangup
            self.requests.append(request)
            pending.append(request)
            self.most = max(self.most, len(pending))

    def _reply(self, server: fake.FakeServer, request: fake.Request) -> list[bytes]:
        begin, end = request.offset, request.offset + request.length
        if request.command == fake.WRITE:
            self.data[begin:end] = request.payload
            return [server.success(request)]
        if server.settings.style == fake.SIMPLE:
            return [fake.simple(request.cookie, 0, bytes(self.data[begin:end]))]
        cuts = sorted({begin, end, *(self._random.randrange(begin, end) for _ in range(4))})
        chunks = [
            server.chunk(request, fake.DATA, fake.data_payload(a, self.data[a:b]))
            for a, b in itertools.pairwise(cuts)
        ]
        self._random.shuffle(chunks)
        return [*chunks, server.chunk(request, fake.NONE, done=True)]

    def _interleave(self, replies: list[list[bytes]]) -> list[bytes]:
        mixed = []
        while replies := [r for r in replies if r]:
            mixed.append(self._random.choice(replies).pop(0))
        return mixed


@pytest.mark.parametrize("style", fake.STYLES)
async def test_many_tasks_read_and_write_at_once(style: str):
    size, block = 1 << 20, 4096
    disk = _Disk(size)
    expected = bytearray(disk.data)
    async with _connected(disk, fake.Settings(style=style, size=size)) as (_, client):

        async def work(number: int) -> None:
            chance = random.Random(number)
            begin, end = number * 32 * block, (number + 1) * 32 * block
            for _ in range(4):
                offset = chance.randrange(begin, end - 2 * block)
                length = chance.randrange(1, 2 * block)
                assert await client.read(offset, length) == expected[offset : offset + length]
                data = chance.randbytes(length)
                expected[offset : offset + length] = data
                await client.write(offset, data)
                assert await client.read(offset, length) == data

        await asyncio.gather(*(work(number) for number in range(8)))
    assert disk.data == expected
    assert disk.most > 1


async def test_no_more_than_the_limit_are_in_flight():
    disk = _Disk(1 << 20)
    async with _connected(disk, in_flight=3) as (_, client):
        await asyncio.gather(*(client.read(4096 * i, 4096) for i in range(20)))
    assert disk.most == 3
    assert len(disk.requests) == 20


@pytest.mark.parametrize("block", [1, 512])
async def test_long_reads_and_writes_are_split(block: int):
    size = 300 * 1024
    disk = _Disk(size)
    settings = fake.Settings(size=size, block_sizes=(block, 4096, 65536))
    async with _connected(disk, settings) as (_, client):
        assert await client.read(512, size - 512) == disk.data[512:]
        data = random.Random(1).randbytes(size - 1024)
        await client.write(1024, bytearray(data))
    assert disk.data[1024:] == data
    lengths = [r.length for r in disk.requests]
    assert max(lengths) == 65536
    assert sum(lengths) == 2 * size - 1536
    assert all(r.offset % block == 0 and r.length % block == 0 for r in disk.requests)


async def test_a_split_read_stops_at_the_first_failure_and_the_connection_lives():
    async def script(server: fake.FakeServer) -> None:
        for _ in range(4):  # a full window; no fifth piece is asked for
            request = await server.request()
            error = fake.error_payload(5, b"broken")
            await server.send(server.chunk(request, fake.ERROR, error, done=True))
        request = await server.request()
        assert request.command == fake.FLUSH
        await server.send(server.success(request))

    settings = fake.Settings(block_sizes=(1, 4096, 65536))
    async with _connected(script, settings) as (_, client):
        with pytest.raises(NBDRequestError, match="broken"):
            await client.read(0, fake.MIB)
        await client.flush()


async def test_a_write_that_changes_its_buffer_afterwards_sends_what_it_held():
    disk = _Disk(8 << 20)
    data = bytearray(b"a" * (4 << 20))
    async with _connected(disk, fake.Settings(size=8 << 20), in_flight=1) as (_, client):
        reading = asyncio.create_task(client.read(0, 4096))
        writing = asyncio.create_task(client.write(0, data))
        await asyncio.sleep(0)
        assert not reading.done()  # so the write waits for its turn
        data[:] = b"b" * len(data)
        await asyncio.gather(reading, writing)
    assert disk.data[: len(data)] == b"a" * len(data)


# -- cancelling


async def test_a_cancelled_request_leaves_the_connection_usable():
    late: list[fake.Request] = []

    async def script(server: fake.FakeServer) -> None:
        late.append(await server.request())
        request = await server.request()
        payload = fake.data_payload(4096, b"b" * 4096)
        await server.send(server.chunk(request, fake.DATA, payload, done=True))
        payload = fake.data_payload(0, b"a" * 4096)  # the late reply, checked and dropped
        await server.send(server.chunk(late[0], fake.DATA, payload, done=True))
        await server.send(server.success(await server.request()))

    async with _connected(script) as (_, client):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await client.read(0, 4096)
        assert await client.read(4096, 4096) == b"b" * 4096
        await client.flush()


async def test_a_cancelled_request_keeps_its_place_until_its_late_reply():
    async def script(server: fake.FakeServer) -> None:
        requests = [await server.request() for _ in range(2)]
        assert await server.drain(0.1) == b""  # the third waits, though two were cancelled
        await server.send(server.success(requests[0]))
        third = await server.request()
        await server.send(server.success(third) + server.success(requests[1]))

    async with _connected(script, in_flight=2) as (_, client):
        cancelled = [asyncio.create_task(client.flush()) for _ in range(2)]
        await asyncio.sleep(0.05)
        for task in cancelled:
            task.cancel()
        await client.flush()


async def test_a_request_cancelled_while_it_waits_for_its_turn_is_never_sent():
    async def script(server: fake.FakeServer) -> None:
        first = await server.request()
        await given_up.wait()
        assert await server.drain(0.15) == b""
        await server.send(server.success(first))

    given_up = asyncio.Event()
    async with _connected(script, in_flight=1) as (_, client):
        first = asyncio.create_task(client.flush())
        await asyncio.sleep(0)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await client.flush()
        given_up.set()
        await first


async def test_a_late_reply_that_lies_is_still_fatal():
    async def script(server: fake.FakeServer) -> None:
        request = await server.request()
        await given_up.wait()
        await server.send(server.chunk(request, fake.DATA, fake.data_payload(9999, b"a")))

    given_up = asyncio.Event()
    async with _connected(script) as (_, client):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await client.read(0, 4096)
        given_up.set()
        with pytest.raises(NBDProtocolError):
            await client.flush()


async def test_a_cancelled_split_write_sends_no_further_piece():
    seen = []

    async def script(server: fake.FakeServer) -> None:
        while (request := await server.request()).command == fake.WRITE:
            seen.append(request)
            if len(seen) == 4:
                full.set()
        await server.send(server.success(request))

    full = asyncio.Event()
    settings = fake.Settings(block_sizes=(1, 4096, 65536))
    async with _connected(script, settings) as (_, client):
        writing = asyncio.create_task(client.write(0, bytes(fake.MIB)))
        await full.wait()
        await asyncio.sleep(0.05)
        writing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await writing
        await client.flush()
    assert len(seen) == 4


# -- block status


@pytest.mark.parametrize("style", [fake.STRUCTURED, fake.EXTENDED])
async def test_block_status_of_every_context(style: str):
    length = 5 << 30 if style == fake.EXTENDED else 1 << 30

    async def script(server: fake.FakeServer) -> None:
        request = await server.request()
        assert (request.length, request.flags) == (length, 0)
        kind = fake.STATUS_EXT if style == fake.EXTENDED else fake.STATUS
        for context, extents in [(4, [(4096, 1), (length - 4096, 2)]), (3, [(65536, 3)])]:
            payload = fake.status_payload(style, context, extents)
            await server.send(server.chunk(request, kind, payload, done=context == 3))
        request = await server.request()
        assert request.flags == fake.REQ_ONE
        error = fake.error_payload(22, b"no")
        await server.send(server.chunk(request, fake.ERROR, error, done=True))

    settings = fake.Settings(style=style, size=1 << 40, contexts={3: BASE, 4: DEPTH})
    async with _connected(script, settings) as (_, client):
        assert client.contexts == (BASE, DEPTH)
        assert client.extended is (style == fake.EXTENDED)
        status = await client.block_status(0, length)
        assert status[BASE].tolist() == [[65536, 3]]
        assert status[DEPTH].tolist() == [[4096, 1], [length - 4096, 2]]
        with pytest.raises(NBDRequestError) as caught:
            await client.block_status(0, 4096, one=True)
        assert caught.value.errno == 22


# -- what may not be sent


async def test_requests_that_may_not_be_sent_are_refused_and_nothing_leaves():
    async def script(server: fake.FakeServer) -> None:
        request = await server.request()
        assert request.command == fake.FLUSH
        await server.send(server.success(request))

    settings = fake.Settings(
        size=1 << 34, flags=1 | 4 | 64 | 1024, block_sizes=(512, 4096, 1 << 20)
    )
    async with _connected(script, settings) as (_, client):
        for wrong in (
            client.read(0, 0),
            client.read(1, 512),
            client.read(0, (1 << 34) + 512),
            client.read(-512, 512),
            client.write(0, b""),
            client.write(512, b"x"),
            client.cache(0, client.max_cache_length + 512),
            client.write_zeroes(0, client.max_effect_length + 512),
        ):
            with pytest.raises(RangeError):
                await wrong
        for missing in (
            client.trim(0, 512),
            client.write(0, bytes(512), fua=True),
            client.write_zeroes(0, 512, fast=True),
            client.read(0, 512, unfragmented=True),
            client.block_status(0, 512),
        ):
            with pytest.raises(UnsupportedError):
                await missing
        await client.flush()


async def test_flags_are_sent():
    async def script(server: fake.FakeServer) -> None:
        for command, flags in [
            (fake.WRITE, fake.FUA),
            (fake.WRITE_ZEROES, fake.NO_HOLE | fake.FAST_ZERO | fake.FUA),
            (fake.TRIM, fake.FUA),
            (fake.CACHE, 0),
            (fake.WRITE_ZEROES, 0),
        ]:
            request = await server.request()
            assert (request.command, request.flags) == (command, flags)
            await server.send(server.success(request))
        request = await server.request()
        assert (request.command, request.flags) == (fake.READ, fake.DF)
        await server.send(server.chunk(request, fake.HOLE, fake.hole_payload(0, 4096), done=True))

    async with _connected(script) as (_, client):
        await client.write(0, b"x", fua=True)
        await client.write_zeroes(0, 4096, no_hole=True, fast=True, fua=True)
        await client.trim(0, 4096, fua=True)
        await client.cache(0, 4096)
        await client.write_zeroes(0, 4096)
        assert await client.read(0, 4096, unfragmented=True) == bytes(4096)


async def test_what_the_server_said_is_told():
    async def script(server: fake.FakeServer) -> None:
        """Say nothing more."""

    settings = fake.Settings(
        size=1 << 40, flags=1 | 2 | 4 | 256 | 1024, block_sizes=(512, 65536, 1 << 20)
    )
    async with _connected(script, settings) as (_, client):
        assert client.size == 1 << 40
        assert client.block_size == (512, 65536, 1 << 20)
        assert client.max_cache_length == 1 << 20
        assert client.max_status_length == (1 << 32) - (2 << 20)
        assert client.read_only
        assert client.can_flush
        assert client.can_multi_conn
        assert client.can_cache
        cannot = ("can_fua", "can_trim", "can_write_zeroes", "can_fast_zero", "can_df")
        assert not any(getattr(client, name) for name in cannot)


async def test_contexts_are_listed():
    async def serve(server: fake.FakeServer) -> None:
        await server.handshake(until=fake.LIST_CONTEXTS)
        assert await server.option() == (fake.ABORT, b"")
        assert await server.drain() == b""
        assert server.eof

    settings = fake.Settings(contexts={0: BASE, 1: "qemu:dirty-bitmap:b"})
    async with fake.FakeServer(serve, settings) as server:
        assert await Client.list_contexts(server.socket) == (BASE, "qemu:dirty-bitmap:b")


async def test_a_socket_given_is_closed_even_when_the_request_is_wrong():
    async def serve(server: fake.FakeServer) -> None:
        await server.drain()

    for wrong in ({"export": "a\0b"}, {"contexts": ["none"]}):
        async with fake.FakeServer(serve) as server:
            with pytest.raises(RequestError):
                await Client.connect(server.socket, **wrong)  # type: ignore[arg-type]
            assert server.socket.fileno() == -1
