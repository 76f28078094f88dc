"""What a copy would be: bytes, room, time, and why."""

from dataclasses import replace

import pytest
from drawing import chain

from qmpblock.copying.options import CopyOptions
from qmpblock.copying.plan import plan_copy
from qmpblock.copying.planned import (
    PlannedCopy,
    PlannedDisk,
    Room,
    amounts,
    amounts_since,
    felt,
    lacking,
    seconds,
    way_of,
    why,
)
from qmpblock.copying.shape import Shape
from qmpblock.extents.allocationmap import AllocationMap

K, M = 1 << 10, 1 << 20


def device():
    """Return a disk of 16M, qcow2 over qcow2."""
    found = chain("d0", "d1").device("d0").graph().device("vd0")
    layers = [replace(one, node=replace(one.node, size=16 * M)) for one in found.chain.layers]
    return replace(found, chain=replace(found.chain, layers=tuple(layers)))


def plan(fmt="qcow2", layers="all"):
    return plan_copy(device(), "/i/copy", fmt, layers, pivot=False)


def seen(*records):
    """Return the map of the disk: (start, length, depth, zero), the rest held by nobody."""
    at, said = 0, []
    for start, length, depth, zero in [*records, (16 * M, 0, 0, True)]:
        if start > at:
            said.append((at, start - at, 1, False, True, False))
        if length:
            said.append((start, length, depth, True, zero, not zero))
        at = start + length
    keys = ("start", "length", "depth", "present", "zero", "data")
    return AllocationMap.from_qemu_img([dict(zip(keys, one, strict=True)) for one in said])


# 100K of the active layer, which touch three units; zeros there; 2M of the one below.
SEEN = seen((60 * K, 100 * K, 0, False), (M, M, 0, True), (4 * M, 2 * M, 1, False))


def test_what_is_read_and_written():
    found = amounts(plan(), CopyOptions(), "views", SEEN)
    assert (found.read, found.write) == (100 * K + 2 * M, 192 * K + 2 * M)
    found = amounts(plan(layers="top"), CopyOptions(layers="top"), "frozen layers", SEEN)
    assert (found.read, found.write) == (100 * K, 192 * K)


def test_what_counts_for_the_speed():
    """Measured on 7.2 and 11.1: a backup's limit counts all that it goes over, a mirror's data."""
    assert amounts(plan(), CopyOptions(), "views", SEEN).paced == 16 * M
    assert amounts(plan(), CopyOptions(at="end"), "mirrors", SEEN).paced == 192 * K + 2 * M
    assert amounts(plan(), CopyOptions(pivot=True), "mirrors", SEEN).paced == 192 * K + 2 * M
    assert amounts(plan(), CopyOptions(), "frozen layers", SEEN).paced == 16 * M
    for way in ("views", "frozen layers"):
        top = amounts(plan(layers="top"), CopyOptions(layers="top"), way, SEEN)
        assert top.paced == 192 * K + M


def test_the_room_that_a_target_needs():
    thin = amounts(plan("qcow2"), CopyOptions(), "views", SEEN)
    assert thin.write < thin.taken < thin.write + 2 * M
    # Of a raw one what is gone over is reserved, until it is whole: the pieces that hold anything.
    raw = amounts(plan("raw"), CopyOptions(), "views", SEEN)
    assert raw.paced == raw.taken < raw.write + 128 * K
    full = replace(plan("raw"), shape=Shape(allocation="full"))
    assert amounts(full, CopyOptions(allocation="full"), "views", SEEN).taken == 16 * M
    assert amounts(plan("raw"), CopyOptions(at="end"), "mirrors", SEEN).taken == 192 * K + 2 * M
    assert amounts(plan("raw"), CopyOptions(at="end"), "mirrors", SEEN, 9 * M).taken == 9 * M


def test_large_clusters_are_written_whole():
    options = CopyOptions(cluster_size=2 * M)
    large = plan_copy(device(), "/i/copy", "qcow2", "all", pivot=False, shape=options.shape)
    assert amounts(large, options, "mirrors", SEEN).write == 4 * M


def test_an_increment_holds_what_was_written():
    """As much is written, zeros or not, never more than the disk has; and its tables."""
    some = amounts_since(plan(), 3 * M)
    assert (some.read, some.write, some.paced) == (3 * M, 3 * M, 3 * M)
    assert 3 * M < some.taken < 5 * M
    assert amounts_since(plan(), 64 * M).write == 16 * M


def test_a_disk_that_holds_nothing():
    found = amounts(plan(), CopyOptions(at="end", speed=M), "mirrors", seen())
    assert (found.read, found.write, found.paced) == (0, 0, 0)


def test_the_time():
    assert seconds([16 * M], 4 * M) == 4
    assert seconds([16 * M, 4 * M], 4 * M) == 8  # each has half of it
    assert seconds([16 * M], 0) is None


def test_less_room_than_targets_need_together():
    a, b, c = Room("/a", 6, 10), Room("/a/b", 6, 10), Room("/c", 10, 10)
    assert list(lacking([(1, a), (2, c)])) == []
    [said] = lacking([(1, a), (1, b), (2, c)])
    assert "10 bytes free" in said
    assert "12 are taken there" in said


@pytest.mark.parametrize(
    ("point", "misread", "way", "told"),
    [
        ("start", False, "views", "QEMU 11.1.2 can have backup jobs read a point in time"),
        ("start", True, "frozen layers", "before 10.0"),
        ("end", True, "mirrors", "background mirror"),
        ("pivot", False, "mirrors", "background mirror"),
    ],
)
def test_the_way(point, misread, way, told):
    assert way_of(point, misread=misread) == way
    assert told in why(way, "11.1.2")


def test_what_the_guest_feels():
    one = plan()
    assert not any("paused" in text for text in felt(CopyOptions(), "views", [one], pauses=False))
    assert any("paused" in text for text in felt(CopyOptions(), "views", [one, one], pauses=False))
    frozen = " ".join(felt(CopyOptions(), "frozen layers", [one], pauses=True))
    assert "qmpblock recover IMAGE" in frozen
    assert "K26" in frozen
    assert any(
        "stale" in text for text in felt(CopyOptions(pivot=True), "mirrors", [one], pauses=False)
    )
    slow = felt(CopyOptions(latency=0.02), "views", [one], pauses=False)
    assert any("take 20 ms (on average; 99%" in text for text in slow)
    assert not any(
        "server" in text for text in felt(CopyOptions(at="end"), "mirrors", [one], pauses=False)
    )


def test_a_sum_is_known_where_all_parts_are():
    disk = PlannedDisk("vd0", "/i/d0", "/i/copy", "raw", 16 * M, 5, 6, None, None)
    whole = PlannedCopy("end", "mirrors", "", (), (disk, disk))
    assert (whole.read, whole.write) == (10, 12)
    part = replace(whole, disks=(disk, replace(disk, read=None, write=None)))
    assert (part.read, part.write) == (None, None)


def test_what_is_shared_takes_no_room_and_is_of_frozen_layers():
    plan = plan_copy(device(), "/i/copy", "qcow2", "all", pivot=False)
    seen = AllocationMap.uniform(0, plan.size, flags=5)
    shared = amounts(plan, CopyOptions(reflink=True), "frozen layers", seen)
    assert shared.write == plan.size
    assert shared.taken < 2 * M < amounts(plan, CopyOptions(), "views", seen).taken
    assert "--reflink" in why("frozen layers", "11.1.2", reflink=True)
    assert "--reflink" not in why("frozen layers", "7.2.22")


def test_by_a_manager_the_vm_is_paused_for_it():
    said = list(felt(CopyOptions(pivot=True), "mirrors", [plan()], pauses=False, managed=True))
    assert said == [
        "the VM is paused at the end until libvirt names the copies: milliseconds, as a rule",
        "it is on the copies from then on: the old images are stale",
    ]
    assert "libvirt is to start the VM from the copies" in why("mirrors", "7.2", managed=True)
