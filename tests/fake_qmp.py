"""A fake QMP peer: sends what a real QEMU never would. Tested in test_fake_qmp.py."""

import asyncio
import json
from contextlib import asynccontextmanager

GREETING = {
    "QMP": {
        "version": {"qemu": {"major": 9, "minor": 8, "micro": 7}, "package": "fake"},
        "capabilities": [],
    }
}
HELLO = json.dumps(GREETING).encode() + b"\r\n"


async def messages(reader):
    """Yield the JSON objects of a stream; qemu.qmp puts nothing between them."""
    text = ""
    while data := await reader.read(65536):
        text += data.decode()
        while text.strip():
            try:
                message, end = json.JSONDecoder().raw_decode(text.lstrip())
            except ValueError:
                break
            text = text.lstrip()[end:]
            yield message


class FakeQMP:
    """One scripted peer.

    :param greeting: bytes sent on connection, or None for a peer that stays silent.
    :param replies: for each command, bytes to send, a dict to send as the reply (its id is
        filled in), or None to close the connection.
    """

    def __init__(self, greeting=None, replies=None):
        self.greeting = greeting
        self.replies = replies or {}
        self.seen = []
        self.writer = None

    async def _serve(self, reader, writer):
        self.writer = writer
        if self.greeting is not None:
            writer.write(self.greeting)
        async for message in messages(reader):
            self.seen.append(message)
            reply = self.replies.get(message["execute"], {"return": {}})
            if reply is None:
                break
            if isinstance(reply, dict):
                reply = (json.dumps({**reply, "id": message.get("id")}) + "\n").encode()
            writer.write(reply)
        writer.close()

    def event(self, name, **data):
        """Send an event now."""
        stamp = {"seconds": 1, "microseconds": 0}
        message = {"event": name, "data": data, "timestamp": stamp}
        self.writer.write((json.dumps(message) + "\n").encode())


@asynccontextmanager
async def fake_qmp(path, greeting=HELLO, replies=None):
    """Listen at `path`; yields the FakeQMP."""
    fake = FakeQMP(greeting, replies)
    server = await asyncio.start_unix_server(fake._serve, str(path))
    async with server:
        yield fake
        if fake.writer is not None:
            fake.writer.close()
