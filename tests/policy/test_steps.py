"""What a policy means for a disk, without a VM: the seed's drawings, ranges, patterns, bases."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpblock.errors import RangeError
from qmpblock.extents.allocationmap import DATA, PRESENT, RESERVED, ZERO, AllocationMap
from qmpblock.policy.file import DiskPolicy, Part
from qmpblock.policy.steps import Facts, Picture, plan_changes, spans, wanted_ranges
from qmpblock.ranges import Ranges
from qmpblock.sizes import Amount

B = 64 << 10
FLAGS = {
    " ": 0,
    "0": PRESENT | ZERO,
    "R": PRESENT | ZERO | RESERVED,
    **dict.fromkeys("XYZ", PRESENT | DATA),
}


def own(row):
    """Return what a layer holds, a block a letter: data, zeros (0), reserved (R), nothing."""
    parts = [AllocationMap.uniform(i * B, B, flags=FLAGS[c]) for i, c in enumerate(row)]
    return AllocationMap.concat(parts)


def picture(*rows):
    """Return a picture of rows, the base first, as they are drawn."""
    files = tuple(f"@{i}" for i in range(len(rows)))
    return Picture(files, tuple(own(row) for row in reversed(rows)))


def wish(allocation="as-is", *, parts=(), **others):
    return DiskPolicy("a", "d", allocation=allocation, parts=parts, **others)


def blocks(first, count):
    return Part(Amount(first * B), Amount(count * B))


def verbs(changes):
    return [(step.verb, step.offset // B, step.length // B) for step in changes.steps]


HALF = (Part(Amount(), Amount(5 * B)),)
DATA_ROW, OVER = "X XX  X X", "YYY      "


@pytest.mark.parametrize(
    ("policy", "before", "after", "move", "reserve"),
    [
        (wish("full"), [" " * 9], ["XXXXXXXXX"], 0, 9),
        (wish("full", parts=HALF), [" " * 9], ["XXXXX    "], 0, 5),
        (wish("full"), [DATA_ROW], ["XXXXXXXXX"], 0, 4),
        (wish("full", parts=HALF), [DATA_ROW], ["XXXXX X X"], 0, 2),
        (wish("thin", independent=True), [DATA_ROW, " " * 9], [DATA_ROW], 5, 0),
        (wish(independent=True), [DATA_ROW, OVER], ["YYYX  X X"], 3, 0),
        (wish("full", independent=True), [DATA_ROW, OVER], ["YYYXXXXXX"], 3, 3),
        (
            wish("full", independent=True),
            ["  ZZ   Z ", "X X   X X", "YY Y     "],
            ["YYXYXXXZX"],
            4,
            2,
        ),
    ],
)
def test_the_eight_drawings(policy, before, after, move, reserve):
    changes = plan_changes(policy, facts(policy, picture(*before)))
    assert changes.wanted.layers == tuple(own(row) for row in reversed(after))
    assert (changes.move, changes.reserve, changes.zeros) == (move * B, reserve * B, 0)
    assert changes.work == sum(step.bytes for step in changes.steps)
    again = Picture(changes.wanted.files, changes.wanted.layers)
    assert plan_changes(policy, facts(policy, again)).steps == ()


def facts(policy, today, **others):
    base = len(today.layers) if policy.independent else 1
    return Facts(today, B, **{"base": base, **others})


def test_as_it_is_nothing_is_done():
    changes = plan_changes(wish(), facts(wish(), picture(DATA_ROW, OVER)))
    assert changes.steps == ()
    assert changes.wanted == picture(DATA_ROW, OVER)


def test_thin_ranges_are_brought_up_and_no_more():
    policy = wish("thin", parts=(blocks(0, 4), blocks(6, 1)))
    changes = plan_changes(policy, facts(policy, picture("X XX0 X X", " " * 9)))
    # One step: between the ranges lie zeros of the base, which are not asked for.
    assert verbs(changes) == [("allocate", 0, 4), ("allocate", 6, 1)]
    assert changes.wanted.layers[0] == own("X XX  X  ")
    assert changes.wanted.layers[1] == own("X XX0 X X")


def test_zeros_below_become_zeros_or_get_host_space():
    today = picture("X00X", "    ")
    thin = plan_changes(wish("thin"), facts(wish(), today))
    assert thin.wanted.layers[0] == own("X00X")
    assert (thin.move, thin.zeros, thin.reserve) == (2 * B, 2 * B, 0)
    full = plan_changes(wish("full"), facts(wish(), today))
    assert full.wanted.layers[0] == own("XXXX")
    assert (full.move, full.zeros, full.reserve) == (2 * B, 0, 2 * B)
    assert verbs(full) == [("reserve", 0, 4)]


def test_like_a_layer_follows_its_pattern():
    today = picture("X X   X ", "     Z  ", "        ")
    like = today.layers[2].where(data=True)
    policy = wish("like", like="master", independent=True)
    changes = plan_changes(policy, facts(policy, today, like=like))
    assert changes.wanted.layers == (own("X X  ZX "),)
    assert changes.reserve == 0
    # Where the pattern has data and the disk zeros, the disk gets host space; elsewhere not.
    today = picture("X X   X ", "0      0")
    changes = plan_changes(policy, facts(policy, today, like=today.layers[1].where(data=True)))
    assert changes.wanted.layers == (own("X X   X0"),)
    assert changes.reserve == B


def test_like_keeping_the_chain_allocates_only_there():
    today = picture("X X   XX", "   ZZ   ", "        ")
    policy = wish("like", like="master")
    changes = plan_changes(policy, facts(policy, today, like=today.layers[2].where(data=True)))
    assert changes.wanted.layers[0] == own("X X   XX")
    assert verbs(changes) == [("reserve", 0, 1), ("reserve", 2, 1), ("reserve", 6, 2)]


def test_a_base_takes_only_what_lies_above_it():
    today = picture("XX      ", "  ZZ    ", "    Y0  ", "        ")
    policy = wish(base="@2")
    changes = plan_changes(policy, Facts(today, B, base=2))
    assert verbs(changes) == [("drop", 0, 8)]
    assert changes.leaving == ("@1",)
    assert changes.wanted.files == ("@0", "@2", "@3")
    assert changes.wanted.layers == (own("    Y0  "), own("  ZZ    "), own("XX      "))
    assert (changes.move, changes.zeros) == (B, B)
    # With thin allocation of a range that the base holds: that comes up, too.
    policy = wish("thin", base="@2", parts=(blocks(0, 1),))
    changes = plan_changes(policy, Facts(today, B, base=2))
    assert verbs(changes) == [("allocate", 0, 1), ("drop", 0, 8)]
    assert changes.wanted.layers[0] == own("X   Y0  ")


def test_what_a_short_layer_hides_becomes_zeros():
    today = Picture(("a", "b", "c"), (own("    "), own("X "), own("ZZZZ")))
    policy = wish(independent=True)
    changes = plan_changes(policy, facts(policy, today))
    assert changes.wanted.layers == (own("XZ00"),)
    assert changes.wanted.guest.without_reserved().where(zero=False) == Ranges([(0, 2 * B)])
    # The short layer goes, the one below stays: its old data must not appear.
    changes = plan_changes(wish(base="c"), Facts(today, B, base=2))
    assert changes.wanted.layers == (own("X 00"), own("ZZZZ"))
    assert changes.wanted.guest.at(3 * B).zero


def test_a_part_of_a_cluster_is_brought_up_whole():
    base = AllocationMap.concat(
        [
            AllocationMap.uniform(0, B // 4, flags=PRESENT | DATA),
            AllocationMap.uniform(B // 4, 3 * B // 4 + B, flags=PRESENT | ZERO),
        ]
    )
    today = Picture(("a", "b"), (own("  "), base))
    changes = plan_changes(wish("full"), facts(wish(), today))
    assert changes.wanted.layers[0] == own("XX")
    assert (changes.move, changes.reserve) == (B, B)


def test_raw_space_is_what_the_file_system_says():
    today = picture("X0X0")
    policy = wish("full")
    changes = plan_changes(policy, facts(policy, today, blank=Ranges([(B, 2 * B)])))
    assert (changes.move, changes.reserve) == (0, B)
    assert changes.wanted.layers == (own("XRX0"),)
    assert plan_changes(policy, facts(policy, today, blank=Ranges())).steps == ()
    # A hole finer than the map knows, in what it calls data, changes no picture.
    changes = plan_changes(policy, facts(policy, today, blank=Ranges([(0, 4096)])))
    assert changes.wanted.layers == today.layers
    assert changes.reserve == 4096


def test_ranges_are_rounded_to_clusters_and_checked():
    size = 10 * B + 512
    policy = wish("thin", parts=(Part(Amount(1), Amount(1)), Part(Amount(percent=Fraction(99)))))
    chosen, full = wanted_ranges(policy, size, B)
    assert not full
    assert chosen == Ranges([(0, B), (9 * B, size)])
    with pytest.raises(RangeError):
        wanted_ranges(wish("thin", parts=(blocks(10, 2),)), size, B)
    assert wanted_ranges(wish("like", like="x"), size, B, Ranges([(0, 99 * B)])) == (
        Ranges([(0, size)]),
        True,
    )


def test_the_time_is_that_of_all_bytes():
    policy = wish("full", independent=True)
    changes = plan_changes(policy, facts(policy, picture(DATA_ROW, OVER)))
    assert changes.seconds(B) == 6
    assert changes.seconds(0) is None


few = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=8).map(
    lambda pairs: Ranges((min(p), max(p)) for p in pairs)
)


@given(few, few)
def test_spans_cover_what_is_wanted_and_nothing_to_avoid(wanted, avoid):
    avoid = avoid - wanted
    found = Ranges(spans(wanted, avoid))
    assert wanted - found == Ranges()
    assert found & avoid == Ranges()
    # No two of them could be one.
    for (_, stop), (start, _) in zip(list(found), list(found)[1:], strict=False):
        assert avoid & Ranges([(stop, start)]) != Ranges()


rows = st.text(alphabet="XY0R ", min_size=8, max_size=8)


@given(
    st.lists(rows, min_size=1, max_size=4),
    st.sampled_from(["as-is", "thin", "full", "like"]),
    st.sampled_from(["keep", "base", "independent"]),
    st.lists(st.tuples(st.integers(0, 7), st.integers(1, 8)), max_size=3),
)
def test_a_plan_keeps_the_content_and_is_done_when_it_is_done(lines, allocation, backing, some):
    today = picture(*lines)
    parts = tuple(blocks(first, min(count, 8 - first)) for first, count in some)
    policy = wish(allocation, parts=parts, independent=backing == "independent")
    like = today.layers[-1].where(data=True) if allocation == "like" else None
    count = len(lines)
    base = {"keep": 1, "base": min(2, max(1, count - 1)), "independent": count}[backing]
    changes = plan_changes(policy, Facts(today, B, base=base, like=like))
    # What the guest reads as data, and as zeros, stays: but reserved zeros may show as data.
    before, after = today.guest, changes.wanted.guest
    assert before.data() - after.data() == Ranges()
    assert len(changes.wanted.layers) == count - base + 1
    assert changes.wanted.layers[1:] == today.layers[base:]
    assert sum(step.bytes for step in changes.steps) == changes.work
    # Every step lies where something is to be done, and twice is once.
    left = plan_changes(policy, Facts(changes.wanted, B, base=min(1, count), like=like))
    assert left.steps == ()
    assert left.wanted == changes.wanted
