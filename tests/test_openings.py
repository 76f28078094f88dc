"""What a file name and a format do not say of how an image is opened."""

import json

import pytest
from drawing import Drawing

from qmpblock.errors import UnsupportedError
from qmpblock.graph import Layer, Node
from qmpblock.openings import Part, description, is_plain, part_of
from qmpblock.places import FileId, Place


def place(path, number=0, *, real=None):
    return Place(FileId(1, number), path, real or path, path)


DISK = {"d0-f": place("/i/disk")}


def opened(described, fmt="raw", **more):
    """Draw an image that QEMU describes so."""
    text = described if isinstance(described, str) else "json:" + json.dumps(described)
    drawing = Drawing().image("d0", fmt, file="/i/disk", filename=text, **more).device("d0")
    return drawing.graph().device("vd0").chain.active


FILE = {"driver": "file", "filename": "/i/disk"}
PART = {"driver": "raw", "offset": 512, "size": 1024, "file": FILE}


@pytest.mark.parametrize(
    ("described", "wanted"),
    [
        ("/i/d", None),
        ({"driver": "raw", "file": FILE}, None),
        (PART, Part(512, 1024)),
        ({"driver": "raw", "offset": "512", "file": FILE}, Part(512, None)),
        ({"driver": "raw", "size": 1024, "file": FILE}, Part(0, 1024)),
        (
            {"driver": "raw", "offset": 512, "file": {"driver": "throttle", "file": FILE}},
            Part(512, None),
        ),
        ({"driver": "qcow2", "file": PART}, Part(512, 1024)),
        ({"driver": "qcow2", "file": {"driver": "raw", "file": FILE}}, None),
        ({"driver": "raw", "offset": ["x"], "file": FILE}, None),
        ("json:[", None),
        ("json:7", None),
    ],
)
def test_parts_of_files(described, wanted):
    layer = opened(described)
    assert part_of(layer) == wanted
    assert is_plain(layer, {}) == (wanted is None)


def test_the_description_opens_it_again():
    assert description(opened(PART), DISK) == PART
    inside = {"driver": "qcow2", "file": PART, "backing": FILE, "cache": {"direct": True}}
    assert description(opened(inside, "qcow2"), DISK) == {"driver": "qcow2", "file": PART}


@pytest.mark.parametrize(
    ("described", "words"),
    [
        ({"driver": "qcow2", "file": {"driver": "luks", "file": PART}}, "not the whole"),
        ({"driver": "raw", "offset": 512, "file": PART}, "a part of a part"),
    ],
)
def test_what_cannot_be_described(described, words):
    with pytest.raises(UnsupportedError, match=words):
        description(opened(described, described["driver"]), DISK)


def test_encrypted_or_unseen():
    with pytest.raises(UnsupportedError, match="it is encrypted"):
        description(opened(PART, encrypted=True), DISK)
    with pytest.raises(UnsupportedError, match="not the whole"):
        description(opened(PART), {})
    with pytest.raises(UnsupportedError, match="not the whole"):
        description(Layer(0, Node("f", "file", "/i/disk", 512, False), None), DISK)


@pytest.mark.parametrize(
    ("recorded", "plain"),
    [("data", True), ("/i/data", True), ("/real/data", True), ("/other", False), (None, False)],
)
def test_a_data_file_that_the_header_does_not_name(recorded, plain):
    drawing = Drawing().image("d0").image("data", "raw", file="data").device("d0")
    drawing.nodes["d0"]["children"].append({"child": "data-file", "node-name": "data-f"})
    drawing.nodes["d0"]["image"]["format-specific"] = {"data": {"data-file": recorded}}
    layer = drawing.graph().device("vd0").chain.active
    places = {"d0-f": place("/i/d0"), "data-f": place("/i/data", 1, real="/real/data")}
    assert is_plain(layer, places) == plain
    if plain:
        return
    assert description(layer, places)["data-file"] == {"driver": "file", "filename": "/i/data"}
    with pytest.raises(UnsupportedError, match="data file"):
        description(layer, {"d0-f": place("/i/d0")})


@pytest.mark.parametrize(
    ("one", "other", "meet"),
    [
        (Part(0, 512), Part(512, 512), False),
        (Part(0, 513), Part(512, 512), True),
        (Part(512, None), Part(0, 512), False),
        (Part(512, None), Part(4096, 1), True),
        (Part(0, None), Part(4096, None), True),
    ],
)
def test_parts_that_meet(one, other, meet):
    assert one.meets(other) == other.meets(one) == meet
