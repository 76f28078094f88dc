"""Drawing a dirty bitmap: which blocks are written to. With a QEMU: live/test_copy_sparse.py."""

import pytest

from qmpblock.copying.comparing import GRAIN
from qmpblock.copying.drawn import _grain, _grains
from qmpblock.ranges import Ranges

MIB = 1 << 20
SIZE = (1 << 30) + 512  # no multiple of anything


@pytest.mark.parametrize(
    ("ranges", "grain"),
    [
        ([(0, GRAIN)], GRAIN),
        ([(4 * MIB, 8 * MIB), (12 * MIB, 20 * MIB)], 4 * MIB),
        ([(4 * MIB, SIZE)], 4 * MIB),  # the end of the disk may be anywhere
        ([(4 * MIB, 8 * MIB), (8 * MIB + GRAIN, 9 * MIB)], GRAIN),
        ([(0, SIZE)], 1 << 30),
        ([(512, 1024)], GRAIN),  # nothing is drawn finer
        ([], 1 << 30),
    ],
)
def test_a_bit_stands_for_as_much_as_the_ranges_allow(ranges, grain):
    assert _grain(Ranges(ranges), SIZE) == grain


def test_each_bit_is_set_by_one_block():
    ranges = Ranges([(0, 4 * MIB), (12 * MIB, SIZE)])
    grain = _grain(ranges, SIZE)
    places = list(_grains(ranges, grain))
    assert len(places) == len(set(places)) == 1 + -(-(SIZE - 12 * MIB) // grain)
    drawn = Ranges([(at, min(at + grain, SIZE)) for at in places])
    assert drawn == ranges
    assert list(_grains(Ranges([(512, 1024)]), GRAIN)) == [0]
