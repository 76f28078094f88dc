"""What is asked for, from a map: all that is below, in whole clusters, data apart from zeros."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from qmpblock.allocation.plan import below, dataless, requests, rounded
from qmpblock.extents.allocationmap import DATA, PRESENT, ZERO, AllocationMap
from qmpblock.ranges import Ranges

SECTOR = 512
LAYERS = 3
#: Depth and flags of what a map may say of a range; the last is what no layer holds.
KINDS = [
    *((depth, PRESENT | DATA) for depth in range(LAYERS)),
    *((depth, PRESENT | ZERO) for depth in range(LAYERS)),
    (0, ZERO),  # hidden by a short layer
    (1, ZERO),
    (LAYERS - 1, ZERO),
]
runs = st.lists(
    st.tuples(st.integers(1, 12), st.integers(0, len(KINDS) - 1)), min_size=1, max_size=20
)
clusters = st.sampled_from([SECTOR, 2 * SECTOR, 4 * SECTOR, 8 * SECTOR])


def map_of(runs: list[tuple[int, int]]) -> AllocationMap:
    parts, at = [], 0
    for sectors, kind in runs:
        depth, flags = KINDS[kind]
        parts.append(
            AllocationMap.uniform(at, sectors * SECTOR, depth=depth, flags=flags, layers=LAYERS)
        )
        at += sectors * SECTOR
    return AllocationMap.concat(parts).coalesce()


def wanted(runs: list[tuple[int, int]]) -> list[bool | None]:
    """Say of each sector: None where nothing is below, else whether that is data."""
    found: list[bool | None] = []
    for sectors, kind in runs:
        depth, flags = KINDS[kind]
        held = depth > 0 if flags & PRESENT else depth < LAYERS - 1
        found += [bool(flags & DATA) if held else None] * sectors
    return found


@given(runs)
def test_below_is_what_lower_layers_supply_or_hide(runs: list[tuple[int, int]]) -> None:
    expected = [
        (n * SECTOR, (n + 1) * SECTOR) for n, held in enumerate(wanted(runs)) if held is not None
    ]
    assert below(map_of(runs)) == Ranges(expected)


@given(runs, clusters, st.integers(1, 40), st.integers(0, 60))
def test_requests(runs: list[tuple[int, int]], cluster: int, sectors: int, zeros: int) -> None:
    limit, zero_limit = sectors * SECTOR, zeros * SECTOR
    amap = map_of(runs)
    size = amap.stop
    found = list(requests(amap, cluster, size, limit, zero_limit))
    sectors_wanted = wanted(runs)
    covered: dict[int, bool] = {}
    for batch in found:
        assert batch.start % cluster == 0, "whole clusters"
        assert batch.stop % cluster == 0 or batch.stop == size
        assert 0 < batch.length <= max(limit, cluster, 0 if batch.data else zero_limit)
        for start in range(batch.start, batch.stop, cluster):
            assert start not in covered, "nothing is asked for twice"
            covered[start] = batch.data
    assert found == sorted(found, key=lambda batch: batch.start)
    for start in range(0, size, cluster):
        inside = sectors_wanted[start // SECTOR : (start + cluster) // SECTOR]
        held = [one for one in inside if one is not None]
        # Each cluster of which anything is below, no other; zeros only where all that is below is.
        assert covered.get(start) == (any(held) if held else None)


@given(runs, clusters, st.lists(st.integers(0, 200), max_size=8))
def test_requests_within_ranges(
    runs: list[tuple[int, int]], cluster: int, places: list[int]
) -> None:
    """As without them, but for what lies elsewhere."""
    amap = map_of(runs)
    where = Ranges((at * cluster, (at + 1) * cluster) for at in places).clip(0, amap.stop)
    found = requests(amap, cluster, amap.stop, cluster, where=where)
    every = requests(amap, cluster, amap.stop, cluster)
    assert list(found) == [one for one in every if one.start in where]


@given(st.integers(0, 4000), st.integers(0, 4000), clusters, st.integers(0, 64))
def test_rounded(offset: int, length: int, cluster: int, more: int) -> None:
    size = -(-(offset + length) // SECTOR) * SECTOR + more * SECTOR
    start, count = rounded(offset, length, cluster, size)
    if not length:
        assert (start, count) == (offset, 0)
        return
    assert start <= offset
    assert offset + length <= start + count <= size
    assert start % cluster == 0
    assert (start + count) % cluster == 0 or start + count == size
    assert count < length + 2 * cluster


@given(runs, clusters)
def test_dataless_is_what_is_no_data_in_whole_clusters(
    runs: list[tuple[int, int]], cluster: int
) -> None:
    amap = map_of(runs)
    data = [bool(KINDS[kind][1] & DATA) for sectors, kind in runs for _ in range(sectors)]
    step, expected = cluster // SECTOR, []
    for first in range(0, len(data), step):
        if not any(data[first : first + step]):  # the disk's end may cut the last one
            expected.append((first * SECTOR, min(first + step, len(data)) * SECTOR))
    assert dataless(amap, cluster, amap.stop) == Ranges(expected)


def test_what_only_has_its_place_is_data() -> None:
    """As preallocation=metadata makes it: mapped, and reading as zeros."""
    amap = AllocationMap.uniform(0, SECTOR, flags=PRESENT | ZERO | DATA)
    assert dataless(amap, SECTOR, SECTOR) == Ranges()
