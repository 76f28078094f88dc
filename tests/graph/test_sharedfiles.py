"""Who else has a layer's file open."""

import json

import pytest
from drawing import Drawing

from qmpblock.graph.places import FileId, Place
from qmpblock.graph.sharedfiles import second_nodes


def two(one, other, *, inodes=None, texts=(None, None), device=True):
    """Draw two disks, each of one raw image, and return what of the second is the first's too."""
    drawing = Drawing().image("d0", "raw", file=one, filename=texts[0]).device("d0")
    drawing.image("e0", "raw", file=other, filename=texts[1])
    if device:
        drawing.device("e0", "vd1")
    places = {
        f"{name}-f": Place(FileId(1, inode), "/x", "/x", "/x")
        for name, inode in zip(("d0", "e0"), inodes or (), strict=False)
    }
    graph = drawing.graph()
    layer = graph.device("vd0").chain.active
    return [node.name for node in second_nodes(graph, layer, places)]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("/i/a", "/i/a", True),
        ("/i/a", "/i/./a", True),
        ("/i/a", "/i/b", False),
        ("a", "a", True),
        ("/i/a", "a", True),  # it may be
        ("/i/a", "../x/i/a", False),
        ("/i/x/a", "../x/a", True),
        ("/i/a", 'json:{"driver":"file","filename":"/i/a"}', True),
        ("/i/a", "json:[", False),
        ("nbd://h/a", "nbd://h/a", True),
        ("nbd://h/a", "nbd://h/b", False),
        ("", "", False),
    ],
)
def test_by_their_names(one, other, same):
    assert two(one, other) == (["e0-f"] if same else [])


@pytest.mark.parametrize(("inodes", "same"), [((1, 1), True), ((1, 2), False)])
def test_by_what_is_open(inodes, same):
    """Names do not count then: hard links, links, and two files of one relative name."""
    for names in (("/i/a", "/i/b"), ("a", "a")):
        assert two(*names, inodes=inodes) == (["e0-f"] if same else [])


def part(offset, size):
    return "json:" + json.dumps(
        {"driver": "raw", "offset": offset, "size": size, "file": {"driver": "file"}}
    )


@pytest.mark.parametrize(
    ("texts", "same"),
    [
        ((part(0, 512), part(512, 512)), False),
        ((part(0, 1024), part(512, 512)), True),
        ((part(0, 512), None), True),
        ((None, part(512, 512)), True),
    ],
)
def test_parts_that_do_not_meet_are_two(texts, same):
    assert two("/i/a", "/i/a", texts=texts) == (["e0-f"] if same else [])


def test_a_node_that_nothing_uses_does_no_harm():
    drawing = Drawing().image("d0", file="/i/a").device("d0").filter("e-f", "file", "d0-f")
    drawing.nodes["e-f"]["children"] = []
    drawing.nodes["e-f"]["file"] = "/i/a"
    graph = drawing.graph()
    assert list(second_nodes(graph, graph.device("vd0").chain.active, {})) == []


def test_a_data_file_is_compared_too():
    drawing = Drawing().image("d0").image("data", "raw", file="/i/data").device("d0")
    drawing.nodes["d0"]["children"].append({"child": "data-file", "node-name": "data-f"})
    drawing.image("e0", "raw", file="/i/data").device("e0", "vd1")
    graph = drawing.graph()
    found = list(second_nodes(graph, graph.device("vd0").chain.active, {}))
    assert [node.name for node in found] == ["e0-f"]
