"""How much room overlays need to come home."""

from qmpblock.copying.frozen import room_wanted

MIB = 1 << 20
GIB = 1 << 30


def test_what_an_overlay_holds_needs_room_once_more():
    assert room_wanted([(100 * GIB, 0)]) == 256 * MIB
    assert room_wanted([(100 * GIB, 3 * GIB)]) == 3 * GIB + 256 * MIB
    assert room_wanted([(100 * GIB, GIB), (100 * GIB, GIB)]) == 2 * GIB + 256 * MIB


def test_no_overlay_grows_past_its_disk():
    """But for its own tables."""
    small = room_wanted([(8 * MIB, 0)])
    assert 8 * MIB < small < 10 * MIB
    assert room_wanted([(8 * MIB, 20 * MIB)]) == 20 * MIB


def test_without_an_overlay_nothing_is_needed():
    assert room_wanted([]) == 0
