"""The range of a disk that is asked for. The rest of Disk: live/test_map.py."""

import pytest

from qmpblock.errors import RangeError
from qmpblock.sizes import check_range


@pytest.mark.parametrize(
    ("offset", "length", "found"),
    [
        (0, None, (0, 100)),
        (40, None, (40, 60)),
        (100, None, (100, 0)),
        (0, 0, (0, 0)),
        (99, 1, (99, 1)),
    ],
)
def test_inside(offset, length, found):
    assert check_range(100, offset, length) == found


@pytest.mark.parametrize(
    ("offset", "length"), [(-1, None), (101, None), (0, 101), (99, 2), (5, -1)]
)
def test_outside(offset, length):
    with pytest.raises(RangeError, match="100 bytes"):
        check_range(100, offset, length)
