"""Catching up: what is written where, of what is to be and what is there."""

import random

import pytest

from qmpblock.copying import catchup
from qmpblock.copying.catchup import HOLD, CatchUp
from qmpblock.copying.comparing import GRAIN
from qmpblock.copying.job import CopyJob
from qmpblock.copying.windows import Window
from qmpblock.errors import StalledError
from qmpblock.ranges import Ranges

MIB = 1 << 20


class Export:
    """An NBD client of what is kept here; says what was written, and whether as zeros."""

    def __init__(self, data):
        self.data = bytearray(data)
        self.reads, self.writes = 0, []

    async def read(self, at, length):
        self.reads += length
        return self.data[at : at + length]

    async def write(self, at, data):
        self.data[at : at + len(data)] = data
        self.writes.append((at, len(data), False))

    async def write_zeroes(self, at, length, *, no_hole):
        assert not no_hole
        self.data[at : at + length] = bytes(length)
        self.writes.append((at, length, True))


def drawn(chance, length):
    """Return grains each of zeros, or of one of two contents."""
    grains = (bytes([chance.choice([0, 1, 2])]) * GRAIN for _ in range(-(-length // GRAIN)))
    return b"".join(grains)[:length]


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("compares", [True, False])
async def test_a_window_is_brought_up_to_date(compares, seed):
    chance = random.Random(seed)
    length = chance.choice([1, GRAIN, 5 * GRAIN, 16 * GRAIN - 7])
    reads = (chance.random() < 0.8, chance.random() < 0.8) if compares else (True, True)
    datas = [drawn(chance, length) if its else bytes(length) for its in reads]
    here, there = map(Export, datas)
    copied = await catchup._bring(
        Window(0, length, reads), here, there, compares=compares, no_hole=False
    )
    assert there.data == here.data == datas[0]
    assert copied == sum(amount for _, amount, _ in there.writes)
    for at, amount, zero in there.writes:
        assert at % GRAIN == 0
        part = datas[0][at : at + amount]
        assert zero is (part == bytes(amount))
        for grain in range(at, at + amount, GRAIN if compares else length):
            assert not compares or datas[0][grain:][:GRAIN] != datas[1][grain:][:GRAIN]
    wanted = sum(
        len(datas[0][at:][:GRAIN])
        for at in range(0, length, GRAIN)
        if not compares or datas[0][at:][:GRAIN] != datas[1][at:][:GRAIN]
    )
    assert copied == wanted
    assert (here.reads, there.reads) == (length * reads[0], length * (reads[1] and compares))


class VM:
    stall = 0.05


@pytest.mark.parametrize(
    ("written", "copied"),
    [
        ([0], 0),
        ([8, 4, 1], 2),  # each pass leaves less
        ([64, 30, 29], 2),  # no more than is copied in a part of what the guest may be held for
        ([500] * 1000, None),
    ],
)
async def test_passes_go_on_while_what_is_left_becomes_less(written, copied, monkeypatch):
    """MiB that the guest writes until each look."""
    seen, passes = iter(written), []
    disk = catchup._Disk(None, "d0", ("a", "b"))
    coming = CatchUp(VM(), "0123abcd", [], CopyJob())
    coming._rate = 30 * MIB / (HOLD * catchup._SHARE)

    async def take_note(_self, disk):
        disk.left = disk.left.union(Ranges([(0, next(seen) * MIB)]))

    async def copy(_self, disks, _phase):
        passes.append(disks[0].left.total)
        disks[0].left = Ranges()
        await catchup.asyncio.sleep(0.01)

    monkeypatch.setattr(CatchUp, "_take_note", take_note)
    monkeypatch.setattr(CatchUp, "_pass", copy)
    if copied is None:
        with pytest.raises(StalledError, match="the guest writes faster than it copies") as caught:
            await coming._come_near([disk])
        assert caught.value.remedy
    else:
        await coming._come_near([disk])
        assert len(passes) == copied
