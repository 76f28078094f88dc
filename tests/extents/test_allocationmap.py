"""AllocationMap against a model that keeps one tuple for each byte."""

from __future__ import annotations

import itertools
import json
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from qmpblock.errors import RangeError, RequestError
from qmpblock.extents.allocationmap import (
    DATA,
    PRESENT,
    RESERVED,
    ZERO,
    AllocationMap,
    Extent,
    Ranges,
    layer_extents_json,
)
from qmpblock.extents.blockstatus import NBDMapBuilder

# Correct, not quick: the machine may be busy with other tests.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

LAYERS = 3
Cell = tuple[int, int]  # depth, flags of one byte


def of_runs(
    start: int, runs: Sequence[tuple[int, int, int]], layers: int = LAYERS
) -> AllocationMap:
    """Build a map from (length, depth, flags)."""
    lengths = np.array([r[0] for r in runs], np.int64)
    offsets = start + np.cumsum(lengths) - lengths
    depth = np.array([r[1] for r in runs], np.int32)
    flags = np.array([r[2] for r in runs], np.uint8)
    return AllocationMap(start, start + int(lengths.sum()), offsets, depth, flags, layers)


def cells(found: AllocationMap) -> list[Cell]:
    """Expand a map into bytes, by its arrays alone."""
    counts = np.diff(np.append(found.offsets, found.stop))
    return list(
        zip(found.depth.repeat(counts).tolist(), found.flags.repeat(counts).tolist(), strict=True)
    )


flag_values = st.integers(0, 15)
runs_of = st.lists(
    st.tuples(st.integers(1, 6), st.integers(0, LAYERS - 1), flag_values), max_size=10
)
maps = st.builds(of_runs, st.integers(0, 20), runs_of)


def canonical(found: AllocationMap) -> bool:
    return all(
        (a.depth, a.present, a.zero, a.data, a.reserved)
        != (b.depth, b.present, b.zero, b.data, b.reserved)
        for a, b in itertools.pairwise(found)
    )


def ranges_where(found: AllocationMap, test) -> Ranges:
    return Ranges((b, b + 1) for b, cell in enumerate(cells(found), found.start) if test(*cell))


@given(maps)
def test_iteration_and_lookup(found: AllocationMap) -> None:
    model = cells(found)
    for extent in found:
        assert found.at(extent.offset) == found.at(extent.offset + extent.length - 1) == extent
        depth, flags = model[extent.offset - found.start]
        assert extent == Extent(
            extent.offset,
            extent.length,
            depth,
            bool(flags & PRESENT),
            bool(flags & ZERO),
            bool(flags & DATA),
            bool(flags & RESERVED),
        )
    assert sum(e.length for e in found) == found.length == found.lengths.sum()
    assert len(list(found)) == len(found)


@given(maps, st.data())
def test_clip(found: AllocationMap, data: st.DataObject) -> None:
    offset = data.draw(st.integers(found.start, found.stop))
    length = data.draw(st.integers(0, found.stop - offset))
    part = found.clip(offset, length)
    assert (part.start, part.stop) == (offset, offset + length)
    assert cells(part) == cells(found)[offset - found.start :][:length]


@given(maps)
def test_coalesce_and_equality(found: AllocationMap) -> None:
    merged = found.coalesce()
    assert canonical(merged)
    assert cells(merged) == cells(found)
    assert merged == found
    assert found.cut(range(found.start, found.stop)) == found


@given(maps, maps)
def test_equality_is_by_content(one: AllocationMap, other: AllocationMap) -> None:
    assert (one == other) == ((one.start, cells(one)) == (other.start, cells(other)))
    assert one != "a map"


@given(maps, st.lists(st.integers(0, 90), max_size=6))
def test_concat_of_clips(found: AllocationMap, cuts: list[int]) -> None:
    points = sorted({found.start, found.stop, *(c for c in cuts if found.start < c < found.stop)})
    if len(points) == 1:
        points *= 2
    parts = [found.clip(a, b - a) for a, b in itertools.pairwise(points)]
    joined = AllocationMap.concat(parts)
    assert cells(joined) == cells(found)
    assert joined == found
    assert canonical(joined)


@given(maps)
def test_totals(found: AllocationMap) -> None:
    model, totals = cells(found), found.totals()
    assert [t.depth for t in totals.layers] == list(range(LAYERS))
    for layer in totals.layers:
        mine = [f for d, f in model if d == layer.depth and f & PRESENT]
        assert layer.data == sum(not f & ZERO for f in mine)
        assert layer.zero == sum(bool(f & ZERO) for f in mine)
        assert layer.reserved == sum(bool(f & ZERO and f & RESERVED) for f in mine)
    assert totals.absent == sum(not f & PRESENT for _, f in model)
    assert sum(t.data + t.zero for t in totals.layers) + totals.absent == found.length


@given(maps)
def test_sets(found: AllocationMap) -> None:
    assert found.data() == ranges_where(found, lambda d, f: f & PRESENT and not f & ZERO)
    assert found.zeros() == ranges_where(found, lambda d, f: f & PRESENT and f & ZERO)
    assert found.holes() == ranges_where(found, lambda d, f: not f & PRESENT)
    assert found.not_in_active() == ranges_where(found, lambda d, f: f & PRESENT and d > 0)
    assert found.where(found.depth == 1, data=True) == found.where(depth=1, data=True)
    assert found.where(depth=1, reserved=False) == ranges_where(
        found, lambda d, f: d == 1 and not f & RESERVED
    )
    everything = Ranges([(found.start, found.stop)])
    assert found.where() == everything == found.data() | found.zeros() | found.holes()


@given(maps, st.lists(st.tuples(st.integers(0, 90), st.integers(0, 20)), max_size=5))
def test_with_reserved(found: AllocationMap, given: list[tuple[int, int]]) -> None:
    ranges = Ranges((a, a + n) for a, n in given)
    marked = found.with_reserved(ranges)
    assert cells(marked) == [
        (d, f | RESERVED if b in ranges and f & PRESENT and f & ZERO else f)
        for b, (d, f) in enumerate(cells(found), found.start)
    ]
    assert marked.without_reserved() == found.without_reserved()
    assert not marked.without_reserved().where(reserved=True).total


@given(maps, st.integers(0, LAYERS - 1))
def test_own(found: AllocationMap, depth: int) -> None:
    assert cells(found.own(depth)) == [
        (0, f if d == depth and f & PRESENT else 0) for d, f in cells(found)
    ]


@given(
    st.lists(
        st.lists(st.tuples(st.integers(1, 6), st.just(0), flag_values)), min_size=1, max_size=4
    )
)
def test_stack(layers: list[list[tuple[int, int, int]]]) -> None:
    stacked = [of_runs(0, runs, 1) for runs in layers]
    contents = [cells(layer) for layer in stacked]

    def seen(byte: int) -> Cell:
        for depth, content in enumerate(contents):
            if byte >= len(content):
                return depth - 1, ZERO  # a short layer hides what is below it
            if content[byte][1] & PRESENT:
                return depth, content[byte][1]
        return len(contents) - 1, ZERO

    found = AllocationMap.stack(stacked)
    assert cells(found) == [seen(b) for b in range(len(contents[0]))]
    assert found.layers == len(layers)


@given(maps)
def test_qemu_img_json_both_ways(found: AllocationMap) -> None:
    records = found.to_qemu_img()
    text = "".join(found.to_qemu_img_json())
    assert json.loads(text) == records
    assert text.endswith("]\n")
    assert text.count("\n") == len(records)
    back = AllocationMap.from_qemu_img(records, layers=LAYERS)
    assert back == found.without_reserved()
    assert back.layers == LAYERS


def test_an_empty_image_is_described_as_qemu_img_does() -> None:
    empty = AllocationMap.uniform(0, 0)
    assert empty.to_qemu_img() == [
        {"start": 0, "length": 0, "depth": 0, "present": False, "zero": False, "data": False}
    ]
    assert AllocationMap.from_qemu_img(empty.to_qemu_img()) == empty
    assert AllocationMap.from_qemu_img([]) == empty


def test_a_depth_past_the_chain_is_refused() -> None:
    records = of_runs(0, [(8, 2, PRESENT)]).to_qemu_img()
    assert AllocationMap.from_qemu_img(records).layers == 3
    with pytest.raises(RequestError, match="depth outside the 2 layers"):
        AllocationMap.from_qemu_img(records, layers=2)


def test_a_map_cannot_be_changed() -> None:
    found = of_runs(0, [(4, 0, PRESENT | DATA), (4, 1, PRESENT)])
    for name in ("offsets", "depth", "flags"):
        with pytest.raises(ValueError, match="read-only"):
            getattr(found, name)[0] = 1
    with pytest.raises(AttributeError):
        found.stop = 9  # type: ignore[misc]
    with pytest.raises(TypeError, match="unhashable"):
        hash(found)


@pytest.mark.parametrize(
    ("start", "stop", "offsets", "depth", "layers", "words"),
    [
        (8, 4, [8], [0], 1, "runs from 8 to 4"),
        (-8, 4, [-8], [0], 1, "runs from -8"),
        (0, 4, [0, 2], [0], 1, "differ in length"),
        (0, 4, [], [], 1, "0 extents over 4 bytes"),
        (0, 0, [0], [0], 1, "1 extents over 0 bytes"),
        (0, 4, [1], [0], 1, "do not cover"),
        (0, 4, [0, 4], [0, 0], 1, "do not cover"),
        (0, 4, [0, 2, 2], [0, 0, 0], 1, "do not ascend"),
        (0, 4, [0], [1], 1, "outside the 1 layers"),
        (0, 4, [0], [-1], 1, "outside the 1 layers"),
        (0, 4, [0], [0], 0, "0 layers"),
    ],
)
def test_columns_that_are_no_map_are_refused(
    start: int, stop: int, offsets: list[int], depth: list[int], layers: int, words: str
) -> None:
    flags = np.zeros(len(depth), np.uint8)
    with pytest.raises(RequestError, match=words):
        AllocationMap(
            start, stop, np.array(offsets, np.int64), np.array(depth, np.int32), flags, layers
        )


def test_ranges_outside_the_map_are_refused() -> None:
    found = of_runs(4, [(4, 0, PRESENT)])
    for offset, length in ((3, 1), (4, 5), (9, 0), (5, -1)):
        with pytest.raises(RangeError, match="outside the map, 4 to 8"):
            found.clip(offset, length)
    for offset in (3, 8):
        with pytest.raises(RangeError, match="outside the map"):
            found.at(offset)
    with pytest.raises(RequestError, match="one stops at 8, the next starts at 4"):
        AllocationMap.concat([found, found])
    with pytest.raises(RequestError, match="no map"):
        AllocationMap.concat([])
    with pytest.raises(RequestError, match="same offset"):
        AllocationMap.stack([])
    with pytest.raises(RequestError, match="a mask of shape"):
        found.where(np.ones(3, np.bool_))


def test_repr_is_short() -> None:
    assert repr(of_runs(0, [(8, 0, 1)])) == "<AllocationMap [0, 8): 1 extents, 3 layers>"


def test_totals_as_a_document() -> None:
    found = of_runs(8, [(4, 0, PRESENT | DATA), (2, 1, PRESENT | ZERO | RESERVED), (1, 2, ZERO)])
    assert found.totals().as_json(size=100) == {
        "size": 100,
        "offset": 8,
        "length": 7,
        "totals": [
            {"depth": 0, "data": 4, "zero": 0, "reserved": 0},
            {"depth": 1, "data": 0, "zero": 2, "reserved": 2},
            {"depth": 2, "data": 0, "zero": 0, "reserved": 0},
        ],
        "absent": 1,
    }


def test_a_layer_as_a_document() -> None:
    own = of_runs(0, [(4, 0, PRESENT | ZERO), (4, 0, PRESENT | ZERO | RESERVED), (2, 0, 0)], 1)
    assert layer_extents_json(own.cut([6])) == [
        layer_record(0, 4, True, True, False, False),
        layer_record(4, 4, True, True, False, True),
        layer_record(8, 2, False, False, False, False),
    ]
    assert layer_extents_json(AllocationMap.uniform(0, 0)) == []


def layer_record(start: int, length: int, *flags: bool) -> dict[str, int | bool]:
    names = ("present", "zero", "data", "reserved")
    return {"start": start, "length": length, **dict(zip(names, flags, strict=True))}


SCHEMAS = Path(__file__).parents[2] / "docs" / "schema"


def validator(name: str) -> Draft202012Validator:
    schema = json.loads((SCHEMAS / name).read_text())
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


TOTALS_SCHEMA = validator("map-totals.schema.json")
LAYERS_SCHEMA = validator("layers.schema.json")


@given(maps)
def test_the_documents_fit_their_schemas(found: AllocationMap) -> None:
    totals, layers = TOTALS_SCHEMA, LAYERS_SCHEMA
    totals.validate(found.totals().as_json(size=found.stop))
    layer = {
        "depth": 0, "node": None, "file": "a.raw", "format": "raw", "size": found.length,
        "source": "qemu-img", "extents": layer_extents_json(found),
    }  # fmt: skip
    layers.validate({"layers": [layer]})
    assert not layers.is_valid({"layers": [layer | {"more": 1}]})
    assert not layers.is_valid({"layers": []})
    assert not totals.is_valid(found.totals().as_json(size=found.stop) | {"absent": -1})


def test_memory_of_a_million_extents_while_building_and_after() -> None:
    """Issue 2, point 6: at most 40 bytes an extent."""
    count, size = 1_000_000, 65536
    reply = np.full((100_000, 2), size, np.uint32)
    reply[0::2, 1], reply[1::2, 1] = 0, 3
    depth = reply.copy()
    depth[:, 1] = 1
    tracemalloc.start()
    try:
        builder = NBDMapBuilder([count * size], 0, count * size)
        while builder.remaining:
            builder.feed(reply, depth)
        small = tracemalloc.get_traced_memory()[1]
        found = builder.finish()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(found) == count
    assert found.nbytes == 13 * count
    assert peak < 40 * count, f"{peak / count} bytes an extent (before finish: {small / count})"
