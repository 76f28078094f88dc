"""Comparing two exports, against what numpy says of the same bytes."""

import asyncio
import contextlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qmpblock.copying import comparing
from qmpblock.copying.comparing import GRAIN, compare, find_unequal
from qmpblock.errors import NBDError, RangeError
from qmpblock.host.qemunbd import QemuNbd
from qmpblock.ranges import Ranges

KIB, MIB = 1 << 10, 1 << 20
SIZE = 4 * MIB + 512


def leaf(path):
    return {"driver": "raw", "file": {"driver": "file", "filename": str(path)}}


def make(path, pieces, size=SIZE):
    """Write a sparse file; return what it holds."""
    contents = bytearray(size)
    with path.open("wb") as file:
        file.truncate(size)
        for at, data in pieces:
            data = data[: size - at]
            file.seek(at)
            file.write(data)
            contents[at : at + len(data)] = data
    return contents


@contextlib.asynccontextmanager
async def served(first, second):
    tool = QemuNbd()
    async with tool.serving(leaf(first)) as one, tool.serving(leaf(second)) as other:
        yield one, other


def differences(one, other):
    return np.flatnonzero(np.frombuffer(one, np.uint8) != np.frombuffer(other, np.uint8)).tolist()


pieces = st.lists(
    st.tuples(
        st.integers(0, SIZE - 1),
        st.sampled_from([b"\1", b"\0" * 9000, b"\2" * 513, b"\1\2" * 50_000, b"\0" * MIB]),
    ),
    max_size=5,
)


@settings(
    max_examples=15,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    deadline=None,
)
@given(shared=pieces, extra=pieces, offset=st.integers(0, SIZE))
def test_it_is_what_the_bytes_say(tmp_path, shared, extra, offset):
    one = make(tmp_path / "one", shared)
    other = make(tmp_path / "other", [*shared, *extra])
    unequal = differences(one, other)
    wanted = [at for at in unequal if at >= offset]

    async def look():
        async with served(tmp_path / "one", tmp_path / "other") as clients:
            return (
                await compare(*clients, offset=offset, all=True),
                await compare(*clients, offset=offset),
                await find_unequal(*clients),
            )

    found, quick, where = asyncio.run(look())
    first = wanted[0] if wanted else None
    assert (found.first_difference, quick.first_difference) == (first, first)
    assert found.equal is quick.equal is (not wanted)
    assert found.differing == len(wanted)
    assert found.compared == SIZE - offset
    everywhere = {at // GRAIN for at in unequal}
    assert where == Ranges((g * GRAIN, (g + 1) * GRAIN) for g in everywhere).clip(0, SIZE)
    grains = {at // GRAIN for at in wanted}
    assert found.unequal == Ranges((g * GRAIN, (g + 1) * GRAIN) for g in grains).clip(0, SIZE)
    assert 0 < quick.compared <= found.compared or offset == SIZE


@pytest.mark.parametrize("at", [0, SIZE - 1, 64 * KIB - 1, 64 * KIB, MIB - 1, MIB, 3 * MIB + 5])
async def test_one_byte_anywhere(tmp_path, at):
    make(tmp_path / "one", [(0, b"x" * MIB)])
    make(tmp_path / "other", [(0, b"x" * MIB), (at, b"y")])
    async with served(tmp_path / "one", tmp_path / "other") as clients:
        found = await compare(*clients, all=True)
    assert (found.first_difference, found.differing) == (at, 1)


async def test_written_zeros_are_holes_and_of_holes_nothing_is_read(tmp_path):
    make(tmp_path / "one", [(MIB, bytes(MIB))])
    make(tmp_path / "other", [])
    seen = []
    async with served(tmp_path / "one", tmp_path / "other") as clients:
        found = await compare(*clients, progress=seen.append)
    assert found.equal
    assert (found.compared, found.read, found.unequal.total) == (SIZE, MIB, 0)
    assert [one.phase for one in seen] == ["comparing"] * len(seen)
    assert (seen[0].done, seen[-1].done, seen[-1].total) == (0, SIZE, SIZE)


@pytest.mark.parametrize("look", [compare, find_unequal])
async def test_what_is_to_be_read_waits_for_its_turn(tmp_path, look):
    """Of what both say that it is zeros nothing is read, and nothing has to wait."""
    make(tmp_path / "one", [(0, b"\1" * MIB), (3 * MIB, b"\2" * 9)])
    make(tmp_path / "other", [(0, b"\1" * MIB)])
    turns = []

    async def turn(length):
        turns.append(length)

    async with served(tmp_path / "one", tmp_path / "other") as clients:
        await look(*clients, turn=turn, **({"all": True} if look is compare else {}))
    assert MIB < sum(turns) <= 2 * MIB
    assert max(turns) <= MIB


async def test_sizes_that_differ(tmp_path):
    make(tmp_path / "one", [(0, b"x")], MIB)
    make(tmp_path / "other", [(0, b"x"), (2 * MIB, b"y")], 3 * MIB)
    async with served(tmp_path / "one", tmp_path / "other") as clients:
        with pytest.raises(RangeError, match="1048576 bytes, the other of 3145728"):
            await compare(*clients)
        with pytest.raises(RangeError, match="1048576 bytes, the other of 3145728"):
            await find_unequal(*clients)
        assert (await compare(*clients, length=MIB)).equal
        assert (await compare(*clients, length=2 * MIB)).equal  # its rest is zeros, up to there
        for pair in (clients, clients[::-1]):
            found = await compare(*pair, length=3 * MIB)
            assert found.first_difference == 2 * MIB
        with pytest.raises(RangeError):
            await compare(*clients, length=3 * MIB + 1)


async def test_cancelled_the_clients_are_usable(tmp_path):
    make(tmp_path / "one", [(0, b"x" * SIZE)])
    make(tmp_path / "other", [(0, b"x" * SIZE)])
    async with served(tmp_path / "one", tmp_path / "other") as clients:
        # By itself at its first word: it cannot have come to its end before it is cancelled.
        task = asyncio.ensure_future(compare(*clients, progress=lambda _: task.cancel()))
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (await compare(*clients)).equal
        assert {one for one in asyncio.all_tasks() if "_unequal" in repr(one)} == set()


async def test_a_connection_that_ends_is_no_difference(tmp_path):
    make(tmp_path / "one", [(0, b"x" * SIZE)])
    make(tmp_path / "other", [(0, b"x" * SIZE)])
    async with served(tmp_path / "one", tmp_path / "other") as (one, other):

        async def cut():
            await other.close()

        cutting = []
        with pytest.raises(NBDError):
            await compare(one, other, progress=lambda _: cutting.append(asyncio.create_task(cut())))
        await asyncio.gather(*cutting)


def test_very_many_differences_take_bounded_memory(monkeypatch):
    monkeypatch.setattr(comparing, "_MOST", 8)
    found = comparing._Found(1000 * GRAIN)
    places = range(0, 1000, 3)
    for grain in places:
        found.add(grain * GRAIN, b"\0\1")
    assert (found.first, found.differing) == (1, len(places))
    ranges = found.ranges()
    assert len(ranges) <= 8
    assert all(grain * GRAIN + 1 in ranges for grain in places)
    assert ranges.stops[-1] <= 1000 * GRAIN
