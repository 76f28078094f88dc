"""Which windows are read: no zeros, and each window once."""

import asyncio
import subprocess
from contextlib import aclosing

import pytest

from qmpblock.copying.windows import WINDOW, Window, in_order, windows
from qmpblock.errors import NBDError, RangeError, RequestError
from qmpblock.host.qemunbd import QemuNbd

MIB = 1 << 20


def leaf(path):
    return {"driver": "raw", "file": {"driver": "file", "filename": str(path)}}


def sparse(path, size, *places):
    with path.open("wb") as file:
        file.truncate(size)
        for at in places:
            file.seek(at)
            file.write(b"data")
    return path


async def seen(*clients, offset=0, length=None, size=WINDOW):
    length = clients[0].size if length is None else length
    found = [one async for one in windows(clients, offset, length, size)]
    at = offset
    for one in found:
        assert one.offset == at
        at += one.length
    assert at == offset + length
    return found


async def test_what_all_say_is_zeros_is_one_window_and_not_read(tmp_path):
    one = sparse(tmp_path / "one", 20 * MIB, 0, 15 * MIB)
    other = sparse(tmp_path / "other", 20 * MIB, 5 * MIB)
    tool = QemuNbd()
    async with tool.serving(leaf(one)) as first, tool.serving(leaf(other)) as second:
        assert await seen(first, second) == [
            Window(0, MIB, (True, False)),
            Window(MIB, 4 * MIB, (False, False)),
            Window(5 * MIB, MIB, (False, True)),
            Window(6 * MIB, 9 * MIB, (False, False)),
            Window(15 * MIB, MIB, (True, False)),
            Window(16 * MIB, 4 * MIB, (False, False)),
        ]
        # A part of it, which ends where it ends.
        found = await seen(first, second, offset=5 * MIB + 7, length=MIB)
        assert found == [
            Window(5 * MIB + 7, MIB - 7, (False, True)),
            Window(6 * MIB, 7, (False, False)),
        ]


async def test_a_fragmented_window_is_read_once(tmp_path):
    image = sparse(tmp_path / "image", 4 * MIB, *range(MIB, 3 * MIB, 8192))
    async with QemuNbd().serving(leaf(image)) as client:
        assert await seen(client) == [
            Window(0, MIB, (False,)),
            Window(MIB, MIB, (True,)),
            Window(2 * MIB, MIB, (True,)),
            Window(3 * MIB, MIB, (False,)),
        ]
        fine = await seen(client, size=4096)
        assert sum(one.length for one in fine if one.reads[0]) == MIB


async def test_past_the_end_of_the_shorter_are_zeros(tmp_path):
    short = sparse(tmp_path / "short", 2 * MIB + 512, MIB)
    long = sparse(tmp_path / "long", 9 * MIB, 8 * MIB)
    tool = QemuNbd()
    async with tool.serving(leaf(short)) as first, tool.serving(leaf(long)) as second:
        assert await seen(first, second, length=9 * MIB) == [
            Window(0, MIB, (False, False)),
            Window(MIB, MIB, (True, False)),
            Window(2 * MIB, 512, (False, False)),
            Window(2 * MIB + 512, 6 * MIB - 512, (False, False)),
            Window(8 * MIB, MIB, (False, True)),
        ]
        with pytest.raises(RangeError):
            await seen(first, second, length=9 * MIB + 1)
        with pytest.raises(RequestError, match="window of 0"):
            await seen(first, second, size=0)


async def test_without_the_context_all_is_read(tmp_path):
    image = sparse(tmp_path / "image", 3 * MIB)
    async with QemuNbd().serving(leaf(image), contexts=[]) as client:
        assert client.contexts == ()
        assert [one.reads for one in await seen(client)] == [(True,)] * 3


async def test_a_server_that_died_is_an_error(tmp_path):
    image = sparse(tmp_path / "image", 3 * MIB, 0)
    async with QemuNbd().serving(leaf(image)) as client:
        await client.close()
        with pytest.raises(NBDError):
            await seen(client)


async def test_zeros_that_are_no_hole_are_not_read_either(tmp_path):
    """Preallocated metadata: the server says that it reads as zeros, and not that it is a hole."""
    path = tmp_path / "image"
    options = ("-f", "qcow2", "-o", "preallocation=metadata")
    subprocess.run(["qemu-img", "create", "-q", *options, path, "2M"], check=True)
    image = {**leaf(path), "driver": "qcow2"}
    async with QemuNbd().serving(image) as client:
        assert set((await client.block_status(0, client.size))["base:allocation"][:, 1]) == {2}
        assert await seen(client) == [Window(0, 2 * MIB, (False,))]


async def test_what_is_under_way_is_cancelled_when_it_is_closed(tmp_path):
    async def parts():
        for number in range(20):
            yield Window(number, 1, ())

    ended = []

    async def work(window):
        try:
            await asyncio.sleep(0 if window.offset == 0 else 60)
        finally:
            ended.append(window.offset)
        return window.offset

    async with asyncio.timeout(120), aclosing(in_order(parts(), work, 4)) as works:
        async for window, result in works:
            assert (window.offset, result) == (0, 0)
            break
    assert sorted(ended) == [0, 1, 2, 3]  # no more were begun
