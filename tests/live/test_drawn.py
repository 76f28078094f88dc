"""Dirty bitmaps of our own drawing: both ways to draw one, on a real QEMU."""

from types import SimpleNamespace

import pytest

import qmpblock
from qmpblock.copying import drawn
from qmpblock.copying.drawn import draw
from qmpblock.names import new_run, target_node
from qmpblock.ranges import Ranges
from qmpblock.testing.scenario import parse_scenario

pytestmark = pytest.mark.live

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40
SIZE = 40 * GIB + 512  # more than one cluster of bits of 64 KiB, and no multiple of anything

DRAWN = [
    (SIZE, []),
    (SIZE, [(0, SIZE)]),
    (SIZE, [(5 * GIB, 5 * GIB + 1), (SIZE - 512, SIZE)]),
    # From one cluster of bits into the next one.
    (SIZE, [(32 * GIB - 64 * KIB, 32 * GIB + 192 * KIB)]),
    (SIZE, [(at, at + 64 * KIB) for at in range(0, SIZE, 64 * MIB)]),
    (2 * TIB, [(0, MIB), (TIB, TIB + 64 * KIB), (2 * TIB - MIB, 2 * TIB)]),
]


@pytest.fixture
async def drawing(start_qemu, invariant):
    """Yield what draws ranges of a disk of some size, and says what QEMU has of the bitmap."""
    vm = await start_qemu(parse_scenario("about: One.\nimages: [{size: 1M}]\n", "one"))
    await invariant.begin(vm)

    async def drawn_on(size, ranges):
        paper = {"driver": "null-co", "node-name": "paper", "size": size, "read-zeroes": True}
        await vm.execute("blockdev-add", **paper)
        plan, node = SimpleNamespace(size=size), target_node(new_run(), 0)
        target = SimpleNamespace(node=node, source="paper", plan=plan, bitmap="")
        async with qmpblock.connect(vm.monitor_path) as controller:
            await draw(controller, target, Ranges(ranges), held=False)
        asked = {"node": "paper", "name": target.bitmap}
        told = await vm.execute("x-debug-block-dirty-bitmap-sha256", **asked)
        nodes = {one["node-name"]: one for one in await vm.execute("query-named-block-nodes")}
        [bitmap] = nodes["paper"]["dirty-bitmaps"]
        await vm.execute("blockdev-del", **{"node-name": "paper"})
        await invariant.verify(vm)
        return told["sha256"], bitmap["granularity"], bitmap["count"], bitmap["recording"]

    return drawn_on


async def test_an_image_in_memory_has_the_bits_that_requests_would_set(drawing, monkeypatch):
    asked, real = [], drawn.exports

    def exports(*words, **more):
        asked.append(words)
        return real(*words, **more)

    monkeypatch.setattr(drawn, "exports", exports)
    of_images = [await drawing(*one) for one in DRAWN]
    assert not asked
    with monkeypatch.context() as without:
        without.setattr(drawn, "bitmap_image", lambda *_: None)
        of_requests = [await drawing(*one) for one in DRAWN]
    assert len(asked) == len(DRAWN) - 1  # for nothing there is no request
    assert of_images == of_requests


async def test_bits_that_no_cluster_is_needed_for(drawing):
    """By requests there would be half a million."""
    ranges = [(0, 32 * GIB), (39 * GIB, 39 * GIB + 64 * KIB)]
    _, grain, count, recording = await drawing(SIZE, ranges)
    assert (grain, count, recording) == (64 * KIB, 32 * GIB + 64 * KIB, False)
