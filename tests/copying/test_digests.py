"""Digests: equal where contents are, and what was written of them is read or refused."""

import asyncio
import hashlib
import json
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from qmpblock.copying import digests as module
from qmpblock.copying.digests import Digests, take_digests, unequal
from qmpblock.errors import RecordError, RequestError
from qmpblock.host.qemunbd import QemuNbd
from qmpblock.ranges import Ranges

KIB, MIB = 1 << 10, 1 << 20
SCHEMA = json.loads((Path(__file__).parents[2] / "docs/schema/digests.schema.json").read_text())


def leaf(path):
    return {"driver": "raw", "file": {"driver": "file", "filename": str(path)}}


def make(path, size, *pieces):
    with path.open("wb") as file:
        file.truncate(size)
        for at, data in pieces:
            file.seek(at)
            file.write(data)
    return path


async def take(path, **options):
    async with QemuNbd().serving(leaf(path)) as client:
        return await take_digests(client, **options)


def of(contents, block=4096):
    """Digests of bytes, as simply as can be."""
    runs = []
    for at in range(0, len(contents), block):
        piece = contents[at : at + block]
        if any(piece):
            number = at // block
            if not runs or runs[-1][0] + len(runs[-1][1]) // 32 != number:
                runs.append((number, b""))
            first, run = runs.pop()
            runs.append((first, run + hashlib.blake2b(piece, digest_size=32).digest()))
    return Digests(len(contents), block, tuple(runs))


@pytest.mark.parametrize("block", [4096, 64 * KIB, MIB, 32 * MIB])
async def test_they_are_of_the_contents(tmp_path, block):
    pieces = [(0, b"a" * 5000), (MIB, bytes(MIB)), (3 * MIB - 1, b"bc"), (5 * MIB + 100, b"d")]
    path = make(tmp_path / "image", 5 * MIB + 512, *pieces)
    seen = []
    found = await take(path, block=block, progress=seen.append)
    assert found == of(path.read_bytes(), block)  # written zeros have none
    assert (seen[-1].done, seen[-1].total, seen[-1].phase) == (found.size, found.size, "reading")
    Draft202012Validator(SCHEMA).validate(found.as_json())
    assert Digests.from_json(json.loads(json.dumps(found.as_json()))) == found


async def test_what_differs_of_two_images(tmp_path):
    one = make(tmp_path / "one", 4 * MIB, (0, b"a"), (MIB, b"b"), (3 * MIB, b"c"))
    other = make(tmp_path / "other", 4 * MIB, (0, b"a"), (MIB + 9, b"b"), (2 * MIB, b"c"))
    found = unequal(await take(one), await take(other))
    assert found == Ranges([(MIB, 4 * MIB)])
    assert unequal(await take(one), await take(one)).total == 0


contents = st.lists(st.sampled_from([b"\0" * 4096, b"a" * 4096, b"b" * 4096, b"c"]), max_size=12)


@given(contents.map(b"".join), contents.map(b"".join))
def test_nothing_outside_what_is_unequal_differs(one, other):
    found = unequal(of(one), of(other))
    assert found == unequal(of(other), of(one))
    longest = max(len(one), len(other))
    for number in range(-(-longest // 4096)):
        piece = slice(number * 4096, (number + 1) * 4096)
        same = one[piece] == other[piece] or (
            not any(one[piece]) and not any(other[piece]) and len(one[piece]) == len(other[piece])
        )
        if same:
            assert number * 4096 not in found
        elif len(one[piece]) == len(other[piece]):
            assert number * 4096 in found
            assert min(longest, number * 4096 + 4096) - 1 in found
    shorter = min(len(one), len(other))
    assert found.intersection(Ranges([(shorter, longest)])).total == longest - shorter


async def test_they_are_taken_in_threads_and_cancelled_at_once(tmp_path, monkeypatch):
    path = make(tmp_path / "image", 16 * MIB, (0, b"a" * 16 * MIB))
    threads = set()
    real = module._digest_of

    def digest_of(data):
        threads.add(threading.current_thread())
        return real(data)

    monkeypatch.setattr(module, "_digest_of", digest_of)
    async with QemuNbd().serving(leaf(path)) as client:
        begun = asyncio.Event()

        def tell(seen):
            if seen.done:
                begun.set()

        task = asyncio.ensure_future(take_digests(client, progress=tell))
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (await take_digests(client)).size == 16 * MIB
    assert threads
    assert threading.main_thread() not in threads


async def test_blocks_that_cannot_be(tmp_path):
    path = make(tmp_path / "image", MIB)
    for block in (0, 1024, 5000, 64 * MIB, -4096):
        with pytest.raises(RequestError, match="no power of two"):
            await take(path, block=block)
    with pytest.raises(RequestError, match="cannot be compared"):
        unequal(await take(path, block=4096), await take(path, block=8192))


GOOD = of(b"a" * 4096 + b"\0" * 4096 + b"b" * 8192).as_json()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": 2}, "of format 2"),
        ({"algorithm": "md5"}, "algorithm is 'md5'"),
        ({"block": 5000}, "no power of two"),
        ({"block": "4096"}, "no number of bytes"),
        ({"size": -1}, "no number of bytes"),
        ({"size": True}, "no number of bytes"),
        ({"size": 8192}, "past the end"),
        ({"runs": None}, "NoneType"),
        ({"runs": [{"offset": 1, "digests": ["00" * 32]}]}, "not where one can be"),
        ({"runs": [{"offset": 0, "digests": []}]}, "not where one can be"),
        ({"runs": [{"offset": 0, "digests": ["00" * 32]}] * 2}, "not where one can be"),
        ({"runs": [{"offset": 0, "digests": ["0g" * 32]}]}, "is no digest"),
        ({"runs": [{"offset": 0, "digests": [7]}]}, "is no digest"),
        ({"runs": [{"digests": []}]}, "there is no 'offset'"),
    ],
)
def test_what_is_none_is_refused(change, words):
    assert Digests.from_json(GOOD).size == 16384
    with pytest.raises(RecordError, match=words):
        Digests.from_json({**GOOD, **change})
    without = {key: value for key, value in GOOD.items() if key not in change}
    if "format" not in change:  # absent, it is 1
        with pytest.raises(RecordError, match="there is no"):
            Digests.from_json(without)
    with pytest.raises(RecordError, match="no JSON object"):
        Digests.from_json([GOOD])
