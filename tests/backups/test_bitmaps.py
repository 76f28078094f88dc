"""What vouches for the bitmaps of a backup."""

from types import SimpleNamespace

import pytest
from backuppoints import bitmap_of, disk, point

from qmpblock.backups.bitmaps import vouched
from qmpblock.graph.model import Bitmap
from qmpblock.names import end_bitmap

GRAIN = 64 << 10
NAME = bitmap_of(point("20261130T110500Z", [disk("vd0", "a.qcow2")]))


def bitmap(name, count):
    return Bitmap(name, GRAIN, recording=name == NAME, persistent=True, count=count)


@pytest.mark.parametrize(
    ("nodes", "does"),
    [
        ({"d0": [bitmap(NAME, 0), bitmap(end_bitmap(NAME), GRAIN)]}, True),
        ({"d0": [bitmap(NAME, GRAIN), bitmap(end_bitmap(NAME), 0)]}, False),  # made smaller
        ({"d0": [bitmap(NAME, GRAIN)]}, False),
        ({"d1": []}, True),  # unplugged since
    ],
)
def test_what_vouches_for_a_bitmap(nodes, does):
    graph = SimpleNamespace(
        nodes={name: SimpleNamespace(bitmaps=bitmaps) for name, bitmaps in nodes.items()}
    )
    active = SimpleNamespace(node=SimpleNamespace(name="d0"))
    device = SimpleNamespace(chain=SimpleNamespace(active=active))
    assert vouched(graph, device, NAME) is does
