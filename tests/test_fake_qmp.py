"""The fake QMP peer does what its docstring says."""

import asyncio
import json

from fake_qmp import GREETING, fake_qmp


async def test_it_greets_replies_and_sends_events(tmp_path):
    async with fake_qmp(
        tmp_path / "q", replies={"a": {"return": 5}, "b": b"raw\n", "c": None}
    ) as fake:
        reader, writer = await asyncio.open_unix_connection(str(tmp_path / "q"))
        assert json.loads(await reader.readline()) == GREETING
        writer.write(b'{"execute": "a", "id": "x"}\n')
        assert json.loads(await reader.readline()) == {"return": 5, "id": "x"}
        fake.event("STOP", why=1)
        assert json.loads(await reader.readline())["data"] == {"why": 1}
        writer.write(b'{"execute": "b"}\n')
        assert await reader.readline() == b"raw\n"
        writer.write(b'{"execute": "c"}\n')
        assert await reader.read() == b""
        assert [m["execute"] for m in fake.seen] == ["a", "b", "c"]
        writer.close()


async def test_it_can_stay_silent(tmp_path):
    async with fake_qmp(tmp_path / "q", greeting=None):
        reader, writer = await asyncio.open_unix_connection(str(tmp_path / "q"))
        task = asyncio.create_task(reader.read(1))
        await asyncio.sleep(0.05)
        assert not task.done()
        writer.close()
        await task
