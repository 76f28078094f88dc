"""How much room the host space takes that a copy is to have."""

from dataclasses import replace

import pytest
from drawing import chain

from qmpblock.copying.plan import plan_copy
from qmpblock.copying.reservation import room_for
from qmpblock.copying.shape import Shape, metadata_of
from qmpblock.extents import DATA, PRESENT, AllocationMap

KIB, MIB = 1 << 10, 1 << 20


def plan(fmt, shape, size=64 * MIB):
    device = chain("d0").device("d0").graph().device("vd0")
    layer = device.chain.layers[0]
    layer = replace(layer, node=replace(layer.node, size=size))
    device = replace(device, chain=replace(device.chain, layers=(layer,)))
    return plan_copy(device, "/i/copy", fmt, "all", pivot=False, shape=shape)


def some(*, data):
    """Return the map of a disk that has that many bytes of data, from 1 KiB on."""
    hole = AllocationMap.uniform(0, KIB)
    held = AllocationMap.uniform(KIB, data, flags=PRESENT | DATA)
    return AllocationMap.concat([hole, held, AllocationMap.uniform(KIB + data, MIB)])


@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
def test_a_thin_one_reserves_nothing(fmt):
    assert room_for(plan(fmt, Shape()), None) == 0


def test_a_full_one_takes_its_size():
    assert room_for(plan("raw", Shape("full")), None) == 64 * MIB
    its = room_for(plan("qcow2", Shape("full", 4096)), None)
    assert its == 64 * MIB + metadata_of(64 * MIB, 4096)


def test_one_like_another_takes_whole_clusters_of_what_that_has():
    like = Shape("like", 64 * KIB)
    assert room_for(plan("raw", Shape("like")), some(data=64 * KIB)) == 128 * KIB
    its = room_for(plan("qcow2", like), some(data=64 * KIB))
    assert its == 128 * KIB + metadata_of(128 * KIB, 64 * KIB)
