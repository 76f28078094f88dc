"""The fake server is as honest as a test asks for, and sees what really happened."""

from __future__ import annotations

import asyncio
import struct

import fake_server as fake
import pytest


async def _client(server: fake.FakeServer) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection(sock=server.socket)


async def test_an_honest_handshake_answers_each_option_once():
    async def script(server: fake.FakeServer) -> None:
        await server.handshake()

    async with fake.FakeServer(script) as server:
        reader, writer = await _client(server)
        assert await reader.readexactly(18) == b"NBDMAGICIHAVEOPT\x00\x03"
        writer.write(struct.pack(">I", 3))
        writer.write(b"IHAVEOPT" + struct.pack(">II", 11, 0))
        refusal = struct.unpack(">QIII", await reader.readexactly(20))
        assert refusal == (0x3E889045565A9, 11, 0x80000001, 0)
        writer.write(b"IHAVEOPT" + struct.pack(">II", 7, 6) + bytes(6))
        reply = await reader.readexactly(20 + 12 + 20)
        assert struct.unpack_from(">HQH", reply, 20) == (0, fake.MIB, fake.ALL_FLAGS)
        assert server.options == [11, 7]
        writer.close()


async def test_it_decodes_requests_of_both_widths():
    seen = []

    async def script(server: fake.FakeServer) -> None:
        seen.append(await server.request())

    request = (1, 1, 7, 4096, 3)
    for style, form, magic in (
        (fake.STRUCTURED, ">IHHQQI", 0x25609513),
        (fake.EXTENDED, ">IHHQQQ", 0x21E41C71),
    ):
        async with fake.FakeServer(script, fake.Settings(style=style)) as server:
            _, writer = await _client(server)
            writer.write(struct.pack(form, magic, *request) + b"abc")
            await asyncio.sleep(0.05)
            writer.close()
        assert seen.pop() == fake.Request(1, 1, 7, 4096, 3, b"abc")


async def test_it_sees_the_end_of_the_stream_unless_a_duplicate_is_held():
    async def script(server: fake.FakeServer) -> None:
        assert await server.drain() == b"bye"

    for custody in (False, True):
        async with fake.FakeServer(script, custody=custody) as server:
            _, writer = await _client(server)
            writer.write(b"bye")
            writer.close()
        assert server.eof is not custody


async def test_it_sees_shutdown_even_when_a_duplicate_is_held():
    async def script(server: fake.FakeServer) -> None:
        await server.drain()

    async with fake.FakeServer(script, custody=True) as server:
        _, writer = await _client(server)
        writer.write_eof()
        await asyncio.sleep(0.05)
        writer.close()
    assert server.eof


def test_it_knows_whether_anything_waits_to_be_read():
    async def script(server: fake.FakeServer) -> None:
        """Not run."""

    for custody in (False, True):
        server = fake.FakeServer(script, custody=custody)
        server.socket.close()
        assert server.saw_nothing() is custody
        server.close()
    server = fake.FakeServer(script, custody=True)
    server.socket.send(b"x")
    assert not server.saw_nothing()
    server.close()


async def test_a_failed_expectation_in_a_script_fails_the_test():
    async def script(server: fake.FakeServer) -> None:
        raise AssertionError("as the script says")

    with pytest.raises(AssertionError, match="as the script says"):
        async with fake.FakeServer(script):
            await asyncio.sleep(0)


def test_messages_have_the_bytes_of_the_specification():
    assert fake.simple(5, 22).hex() == "67446698" + "00000016" + "0000000000000005"
    structured = fake.chunk(fake.STRUCTURED, 5, fake.HOLE, fake.hole_payload(1, 2), done=True)
    assert structured.hex() == (
        "668e33ef" + "0001" + "0002" + "0000000000000005" + "0000000c0000000000000001" + "00000002"
    )
    extended = fake.chunk(fake.EXTENDED, 5, fake.NONE, done=True, offset=9)
    assert extended.hex() == (
        "6e8a278c" + "0001" + "0000" + "0000000000000005" + "0000000000000009" + "00" * 8
    )
    assert fake.error_payload(5, b"no", 8).hex() == "00000005" + "0002" + "6e6f" + "00" * 7 + "08"
    assert fake.status_payload(fake.STRUCTURED, 1, [(2, 3)]).hex() == "000000010000000200000003"
    assert len(fake.status_payload(fake.EXTENDED, 1, [(2, 3)] * 2)) == 8 + 32
