"""The verifier of stress runs: it accepts what may be, and finds everything else."""

from __future__ import annotations

import time
import zlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpblock.errors import RangeError
from qmpblock.testing import stamps
from qmpblock.testing.stamps import (
    Bounds,
    StressSpec,
    Taken,
    check_acknowledged,
    check_one_instant,
    check_point_in_time,
    checksum,
    expected_content,
    stamped,
)

SPEC = StressSpec(offset=5 << 20, blocks=64, block_size=2048, queue_depth=4, seed=99)
WRITES = 100
BOUNDS = Bounds(acked=WRITES - 40, issued=WRITES + 40)


def content(*sequences: int, spec: StressSpec = SPEC) -> bytearray:
    """Return the area after exactly these writes, applied in order, one by one in plain Python."""
    data = bytearray(spec.length)
    for sequence in sequences:
        block = slow_block(spec, sequence)
        at = block * spec.block_size
        data[at : at + spec.block_size] = stamped(
            spec.offset + at, spec.block_size, sequence=sequence, seed=spec.seed
        )
    return data


def slow_mix(x: int) -> int:
    """Hash as the C source does, in Python's integers."""
    x = x * 0x9E3779B1 & 0xFFFFFFFF
    x ^= x >> 15
    x = x * 0x85EBCA77 & 0xFFFFFFFF
    return x ^ x >> 13


def slow_block(spec: StressSpec, sequence: int) -> int:
    return slow_mix(sequence ^ spec.seed) & (spec.blocks - 1)


def slow_stamp(sector: int, sequence: int, seed: int) -> bytes:
    key = slow_mix(
        (sector & 0xFFFFFFFF) ^ slow_mix(sector >> 32 ^ slow_mix(sequence ^ slow_mix(seed)))
    )
    words = [0x32534754, seed, sector & 0xFFFFFFFF, sector >> 32, sequence]
    words += [(key + i * 0x9E3779B1) & 0xFFFFFFFF for i in range(121)]
    words += [sequence, sequence ^ 0xFFFFFFFF]
    return b"".join(word.to_bytes(4, "little") for word in words)


@given(
    sector=st.integers(0, (1 << 40) - 2),
    sequence=st.integers(1, 0xFFFFFFFF),
    seed=st.integers(0, 0xFFFFFFFF),
)
def test_stamp_is_what_its_layout_says(sector: int, sequence: int, seed: int) -> None:
    expected = slow_stamp(sector, sequence, seed) + slow_stamp(sector + 1, sequence, seed)
    assert stamped(sector * 512, 1024, sequence=sequence, seed=seed) == expected


def test_expected_content_is_the_writes_applied_in_order() -> None:
    assert expected_content(SPEC, WRITES) == content(*range(1, WRITES + 1))


def test_expected_content_after_nothing_is_the_background() -> None:
    assert expected_content(SPEC, 0, background=0xAA) == b"\xaa" * SPEC.length


def test_checksum_is_crc32_of_any_buffer() -> None:
    data = bytes(range(256)) * 4
    assert checksum(data) == checksum(np.frombuffer(data, np.uint8)) == zlib.crc32(data)


@given(acked=st.integers(0, WRITES), beyond=st.integers(0, 20))
def test_acknowledged_accepts_every_orderly_state(acked: int, beyond: int) -> None:
    data = expected_content(SPEC, acked + beyond)
    assert check_acknowledged(data, SPEC, acked, acked + beyond).ok


@given(st.sets(st.integers(WRITES + 1, WRITES + 20)))
def test_acknowledged_accepts_any_subset_beyond_the_bound(beyond: set[int]) -> None:
    data = content(*range(1, WRITES + 1), *sorted(beyond))
    result = check_acknowledged(data, SPEC, WRITES, WRITES + 20)
    assert result.ok
    assert result.ahead == len({slow_block(SPEC, sequence) for sequence in beyond})


@given(at=st.integers(0, SPEC.length - 1), flip=st.integers(1, 255))
def test_any_flipped_byte_is_found(at: int, flip: int) -> None:
    data = bytearray(expected_content(SPEC, WRITES))
    data[at] ^= flip
    for result in (
        check_acknowledged(data, SPEC, WRITES, WRITES),
        check_point_in_time(data, SPEC, BOUNDS),
    ):
        assert [fault.block for fault in result.torn] == [at // SPEC.block_size]
        assert not result.ok
    assert result.torn[0].found is None


@given(lost=st.integers(1, WRITES))
def test_a_lost_write_is_found_unless_overwritten(lost: int) -> None:
    kept = [sequence for sequence in range(1, WRITES + 1) if sequence != lost]
    data = content(*kept)
    result = check_acknowledged(data, SPEC, WRITES, WRITES)
    block = slow_block(SPEC, lost)
    if block in {slow_block(SPEC, sequence) for sequence in range(lost + 1, WRITES + 1)}:
        assert result.ok
    else:
        older = [s for s in range(1, lost) if slow_block(SPEC, s) == block]
        assert [(fault.block, fault.found, fault.expected) for fault in result.lost] == [
            (block, older[-1] if older else 0, lost)
        ]
        assert f"expected write {lost}" in str(result)


def test_a_write_never_issued_is_found() -> None:
    data = expected_content(SPEC, WRITES + 1)
    result = check_acknowledged(data, SPEC, WRITES, WRITES)
    assert [fault.found for fault in result.future] == [WRITES + 1]
    assert not result.ok


def test_a_stamp_in_a_block_that_its_number_does_not_go_to_is_found() -> None:
    data = content(*range(1, WRITES + 1))
    sequence = WRITES + 1
    wrong = (slow_block(SPEC, sequence) + 1) % SPEC.blocks
    at = wrong * SPEC.block_size
    data[at : at + SPEC.block_size] = stamped(
        SPEC.offset + at, SPEC.block_size, sequence=sequence, seed=SPEC.seed
    )
    result = check_acknowledged(data, SPEC, WRITES, sequence)
    assert [fault.block for fault in result.torn] == [wrong]


def test_a_block_moved_to_another_place_is_found() -> None:
    data = bytearray(expected_content(SPEC, 5 * WRITES))
    size = SPEC.block_size
    data[:size] = data[3 * size : 4 * size]
    assert [f.block for f in check_acknowledged(data, SPEC, 500, 500).torn] == [0]


def test_zeros_over_an_acknowledged_write_are_a_lost_write() -> None:
    data = bytearray(expected_content(SPEC, WRITES))
    block = slow_block(SPEC, WRITES)
    at = block * SPEC.block_size
    data[at : at + 512] = bytes(512)
    result = check_acknowledged(data, SPEC, WRITES, WRITES)
    assert [(fault.block, fault.found) for fault in result.lost] == [(block, 0)]
    assert [fault.block for fault in check_point_in_time(data, SPEC, BOUNDS).torn] == [block]


def test_point_in_time_accepts_up_to_the_queue_depth_in_flight() -> None:
    late = [WRITES - 1, WRITES - 3, WRITES - 30]  # after what BOUNDS say was acknowledged
    data = content(*(s for s in range(1, WRITES + 1) if s not in late))
    result = check_point_in_time(data, SPEC, BOUNDS)
    assert result.ok
    assert result.sequence == WRITES
    assert 1 <= result.in_flight <= 3


def test_point_in_time_finds_more_missing_than_can_have_been_in_flight() -> None:
    newest = [s for s in range(1, WRITES) if s == _last_to_its_block(s)][-5:]
    data = content(*(s for s in range(1, WRITES + 1) if s not in newest))
    assert len(check_point_in_time(data, SPEC, BOUNDS).lost) == 5
    assert check_point_in_time(data, SPEC, BOUNDS, queue_depth=5).ok


def _last_to_its_block(sequence: int) -> int:
    same = [s for s in range(1, WRITES + 1) if slow_block(SPEC, s) == slow_block(SPEC, sequence)]
    return same[-1]


def test_point_in_time_finds_a_block_two_writes_behind() -> None:
    # two writes to one block are never in flight together, so the older one cannot be missing
    by_block: dict[int, list[int]] = {}
    for sequence in range(1, WRITES + 1):
        by_block.setdefault(slow_block(SPEC, sequence), []).append(sequence)
    block, sequences = next((b, s) for b, s in by_block.items() if len(s) >= 3 and WRITES not in s)
    data = content(*(s for s in range(1, WRITES + 1) if s not in sequences[-2:]))
    assert [fault.block for fault in check_point_in_time(data, SPEC, BOUNDS).lost] == [block]


def test_point_in_time_finds_a_missing_write_that_is_too_old_to_have_been_in_flight() -> None:
    spec = StressSpec(blocks=1 << 14, block_size=512, queue_depth=4)
    n = 6000
    once = next(
        s for s in range(1, 100) if np.sum(stamps.block_of(spec, 1, n) == slow_block(spec, s)) == 1
    )
    data = bytearray(expected_content(spec, n))
    at = slow_block(spec, once) * 512
    data[at : at + 512] = bytes(512)
    assert len(check_point_in_time(data, spec, Bounds(1, n)).lost) == 1


def test_point_in_time_finds_a_mixed_block() -> None:
    data = content(*range(1, WRITES + 1))
    older = content(*range(1, WRITES))
    at = slow_block(SPEC, WRITES) * SPEC.block_size
    data[at + 512 : at + 1024] = older[at + 512 : at + 1024]
    assert len(check_point_in_time(data, SPEC, BOUNDS).torn) == 1


def test_an_empty_run_on_a_patterned_background() -> None:
    data = b"\xaa" * SPEC.length
    assert check_acknowledged(data, SPEC, 0, 0, background=0xAA).ok
    written = expected_content(SPEC, WRITES, background=0xAA)
    assert check_point_in_time(written, SPEC, BOUNDS, background=0xAA).ok
    assert check_point_in_time(written, SPEC, BOUNDS).torn
    assert not check_acknowledged(data, SPEC, 0, 0).ok


def test_wrong_length_and_disordered_bounds_are_refused() -> None:
    with pytest.raises(RangeError, match="512 bytes of an area"):
        check_acknowledged(bytes(512), SPEC, 0, 0)
    with pytest.raises(RangeError, match="in order"):
        check_acknowledged(bytes(SPEC.length), SPEC, 2, 1)
    with pytest.raises(RangeError, match="multiples of 512"):
        stamped(0, 100, sequence=1, seed=1)


@pytest.mark.parametrize(
    "wrong",
    [
        {"disk": -1},
        {"offset": 100},
        {"blocks": 100},
        {"blocks": 1 << 22},
        {"block_size": 1000},
        {"block_size": 1 << 17},
        {"queue_depth": 63},
        {"total": 1 << 31},
        {"seed": 1 << 32},
        {"flush_every": -1},
        {"rate": -1},
        {"read_percent": 100},
    ],
)
def test_a_run_that_the_guest_would_refuse_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(RangeError, match="a stress run cannot have"):
        StressSpec(**wrong)


def test_64_mib_are_verified_in_about_a_second() -> None:
    spec = StressSpec(blocks=1 << 14, block_size=4096)
    data = expected_content(spec, 50_000)
    began = time.process_time()  # of this process alone, however busy the machine is
    assert check_acknowledged(data, spec, 50_000, 50_000).ok
    assert time.process_time() - began < 5


# -- what a check of a point in time must not pass on


@pytest.mark.parametrize("nothing", [bytes(SPEC.length), expected_content(SPEC, 0)])
def test_an_image_that_holds_nothing_is_no_point_in_time(nothing: bytes) -> None:
    result = check_point_in_time(nothing, SPEC, BOUNDS)
    written = {slow_block(SPEC, sequence) for sequence in range(1, BOUNDS.acked + 1)}
    assert {fault.block for fault in result.lost} == written
    assert {fault.found for fault in result.lost} == {0}


@given(n=st.integers(0, WRITES + 60))
def test_only_a_time_between_the_bounds_is_right(n: int) -> None:
    """A stale image is a whole one, of another time; so is one from the future."""
    result = check_point_in_time(expected_content(SPEC, n), SPEC, BOUNDS)
    overwritten = {slow_block(SPEC, s) for s in range(n + 1, BOUNDS.acked + 1)}
    if n < BOUNDS.acked:
        assert {fault.block for fault in result.lost} == overwritten
        assert f"{len(overwritten)} lost" in str(result)
    assert bool(result.future) == (n > BOUNDS.issued)
    assert result.ok == (BOUNDS.acked <= n <= BOUNDS.issued)


@given(missing=st.integers(1, WRITES))
def test_what_was_acknowledged_before_cannot_have_been_in_flight(missing: int) -> None:
    data = content(*(s for s in range(1, WRITES + 1) if s != missing))
    result = check_point_in_time(data, SPEC, BOUNDS)
    last = _last_to_its_block(missing) == missing
    assert result.ok == (not last or missing > BOUNDS.acked)


def test_another_run_and_another_place_are_no_point_in_time() -> None:
    other_seed = expected_content(replace(SPEC, seed=SPEC.seed + 1), WRITES)
    assert check_point_in_time(other_seed, SPEC, BOUNDS).torn
    elsewhere = expected_content(replace(SPEC, offset=SPEC.offset + SPEC.length), WRITES)
    assert check_point_in_time(elsewhere, SPEC, BOUNDS).torn
    swapped = bytearray(expected_content(SPEC, WRITES))
    size = SPEC.block_size
    swapped[:size], swapped[size : 2 * size] = swapped[size : 2 * size], swapped[:size]
    assert [f.block for f in check_point_in_time(swapped, SPEC, BOUNDS).torn] == [0, 1]


@pytest.mark.parametrize("bounds", [None, 4, (1, 100), {}])
def test_without_bounds_it_is_an_error(bounds: Any) -> None:
    with pytest.raises(TypeError, match=r"bounds must be Bounds\(acked=..., issued=...\)"):
        check_point_in_time(bytes(SPEC.length), SPEC, bounds)
    with pytest.raises(TypeError, match="bounds"):
        check_point_in_time(bytes(SPEC.length), SPEC)  # type: ignore[call-arg]


def test_bounds_that_an_empty_image_meets_are_refused() -> None:
    with pytest.raises(RangeError, match="an empty image would pass"):
        Bounds(acked=0, issued=7)
    for acked, issued in ((8, 7), (-1, 7), (1, 1 << 31)):
        with pytest.raises(RangeError, match="in order"):
            Bounds(acked, issued)


# -- several disks at one instant

GROUP = [replace(SPEC, disk=disk, seed=disk + 5, group=(0, 1, 2)) for disk in range(3)]


def taken(*numbers: int, bounds: Bounds = BOUNDS) -> dict[str, Taken]:
    """Return the disks of the group, each as after so many writes."""
    return {
        f"d{spec.disk}": Taken(expected_content(spec, n), spec, bounds)
        for spec, n in zip(GROUP, numbers, strict=True)
    }


@given(st.tuples(*[st.integers(WRITES - SPEC.queue_depth, WRITES)] * 3))
def test_disks_within_the_queue_depth_are_of_one_instant(numbers: tuple[int, ...]) -> None:
    result = check_one_instant(taken(*numbers))
    assert result.ok, str(result)
    assert result.sequence == max(numbers)


@given(st.permutations([WRITES, WRITES + 10, WRITES + 20]))
def test_copies_one_after_the_other_are_not(numbers: list[int]) -> None:
    result = check_one_instant(taken(*numbers))
    assert not result.ok
    assert result.sequence == WRITES + 20
    bad = [name for name, disk in result.disks.items() if not disk.ok]
    assert bad == [f"d{i}" for i, n in enumerate(numbers) if n != WRITES + 20]
    assert f"{bad[0]} (newest {numbers[int(bad[0][1])]})" in str(result)


def test_one_of_them_beyond_what_another_can_have_issued_is_found() -> None:
    disks = taken(WRITES, WRITES, WRITES + 30)
    disks["d0"] = disks["d0"]._replace(bounds=Bounds(WRITES - 40, WRITES))
    assert check_one_instant(disks).disks["d0"].lost


def test_disks_that_do_not_keep_step_are_of_no_instant() -> None:
    alone = {name: t._replace(spec=replace(t.spec, group=())) for name, t in taken(9, 9, 9).items()}
    for disks in (alone, {}, {"d0": taken(9, 9, 9)["d0"]}):
        with pytest.raises(RangeError, match="whose runs keep step") as caught:
            check_one_instant(disks)
        assert "stress_in_step" in (caught.value.remedy or "")


@pytest.mark.parametrize("group", [(1,), (0, 16), (0, -1)])
def test_a_group_has_the_disk_itself_and_disks_that_can_be(group: tuple[int, ...]) -> None:
    with pytest.raises(RangeError, match="the group"):
        StressSpec(disk=0, group=group)
