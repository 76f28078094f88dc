"""What lies above an image, by what QEMU says of its block graph."""

from qmpblock.migration.actives import above

NODES = [
    {"id": 1, "type": "block-backend", "name": "/machine/peripheral/v0/virtio-backend"},
    {"id": 2, "type": "block-driver", "name": "throttle"},
    {"id": 3, "type": "block-driver", "name": "d0"},
    {"id": 4, "type": "block-driver", "name": "d0-file"},
    {"id": 5, "type": "block-driver", "name": "theirs"},
    {"id": 6, "type": "block-driver", "name": "d1"},
]
BEFORE = [(1, "root", 2), (2, "file", 3), (3, "file", 4)]
AFTER = [(1, "root", 2), (2, "file", 5), (5, "backing", 3), (3, "file", 4)]
ROOT = ("/machine/peripheral/v0/virtio-backend", "root", "throttle")


def graph(edges):
    told = [dict(zip(("parent", "name", "child"), one, strict=True), perm=[]) for one in edges]
    return {"nodes": NODES, "edges": told}


def test_all_that_uses_it_and_nothing_else():
    assert above(graph(BEFORE), {"d0"}) == {ROOT, ("throttle", "file", "d0")}
    assert above(graph([*BEFORE, (6, "backing", 4)]), {"d0"}) == above(graph(BEFORE), {"d0"})


def test_a_snapshot_is_seen_below_a_filter():
    after = {ROOT, ("throttle", "file", "theirs"), ("theirs", "backing", "d0")}
    assert above(graph(AFTER), {"d0"}) == after


def test_of_none_there_is_nothing():
    assert above(graph(BEFORE), set()) == above(graph(BEFORE), {"gone"}) == frozenset()
