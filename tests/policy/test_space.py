"""The host's space: who takes what, and what is given up where it runs short."""

import asyncio

import pytest

from qmpblock.errors import Error
from qmpblock.host.space import HostSpace
from qmpblock.policy.space import Book, Take, check_takes, unless_short

SAID = {"standing": "all is there", "remedy": "make room"}


def test_what_is_taken_of_one_file_system_adds_up():
    space, other = HostSpace("/a", 1, 100, 10), HostSpace("/b", 2, 100)
    check_takes([Take(space, 50, "/a/1"), Take(space, 40, "/a/2"), Take(other, 100, "/b/1")], {})
    with pytest.raises(Error, match="this one needs 91"):
        check_takes([Take(space, 50, "/a/1"), Take(space, 41, "/a/2")], {})
    with pytest.raises(Error, match="of which 1 are promised"):
        check_takes([Take(other, 100, "/b/1")], {2: 1})


def test_what_is_under_way_will_take_what_it_has_not_taken_yet(tmp_path):
    space, file, book = HostSpace(str(tmp_path), 1, 1 << 20), tmp_path / "copy", Book()
    book.begin("one", [Take(space, 1 << 20, str(file))])
    with pytest.raises(Error, match="1048576 are promised"):
        book.begin("two", [Take(space, 1, "/none")])
    file.write_bytes(b"x" * (1 << 19))
    book.begin("two", [Take(space, 1 << 19, "/none")])
    book.end("two")
    book.end("one")
    book.end("one")
    book.begin("two", [Take(space, 1 << 20, "/none")])


async def test_work_is_given_up_where_the_host_runs_short(tmp_path):
    image = tmp_path / "image"
    image.touch()
    undone = []

    async def work():
        try:
            await asyncio.Event().wait()
        finally:
            undone.append(True)

    def give_back():
        assert undone == [True]
        undone.append("given back")

    space = HostSpace(str(image), 0, 0, 1 << 62)
    with pytest.raises(Error, match=r"keeps so.*\n.*given up; all is there.*\n.*make room"):
        await unless_short(work(), [space], **SAID, give_back=give_back)
    assert undone == [True, "given back"]
    result = object()

    async def quick():
        return result

    assert await unless_short(quick(), [space], **SAID) is result
    assert await unless_short(quick(), [], **SAID) is result


async def test_cancelled_the_work_is_waited_for(tmp_path):
    undone = []

    async def work():
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.01)
            undone.append(True)

    task = asyncio.ensure_future(unless_short(work(), [], **SAID))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert undone == [True]
