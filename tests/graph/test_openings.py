"""What a file name and a format do not say of how an image is opened."""

import json

import pytest
from drawing import Drawing

from qmpblock.errors import UnsupportedError
from qmpblock.graph.model import Layer, Node
from qmpblock.graph.openings import Part, description, in_part, is_plain, part_of
from qmpblock.graph.places import FileId, Place


def place(path, number=0, *, real=None):
    return Place(FileId(1, number), path, real or path, path)


DISK = {"d0-f": place("/i/disk")}


def opened(*levels, **more):
    """Draw an image of these nodes, each a driver and what QEMU calls it; the format node first."""
    drawing = Drawing()
    for number in reversed(range(1, len(levels))):
        driver, text = levels[number]
        drawing.filter(
            f"d0-{number}", driver, "d0-f" if number == len(levels) - 1 else f"d0-{number + 1}"
        )
        drawing.nodes[f"d0-{number}"]["file"] = text
    driver, text = levels[0]
    above = Drawing().image("d0", driver, file="/i/disk", filename=text, **more)
    drawing.nodes |= above.nodes
    if len(levels) > 1:
        drawing.nodes["d0"]["children"] = [{"child": "file", "node-name": "d0-1"}]
    return drawing.device("d0").graph().device("vd0").chain.active


FILE = {"driver": "file", "filename": "/i/disk"}
PART = {"driver": "raw", "offset": 512, "size": 1024, "file": FILE}


def text(**options):
    return "json:" + json.dumps({"driver": "raw", **options, "file": FILE})


RAW = ("raw", text(offset=512, size=1024))
CUT = ("qcow2", 'json:{"driver": "qcow2", "file": {"driver": "ra')  # by QEMU: it was too long


@pytest.mark.parametrize(
    ("levels", "wanted"),
    [
        ([("raw", "/i/d")], None),
        ([("raw", text())], None),
        ([("qcow2", text(offset=512))], None),  # another format's options
        ([RAW], Part(512, 1024)),
        ([("raw", text(offset="512"))], Part(512, None)),
        ([("raw", text(offset="1M", size="0x200"))], Part(1 << 20, 512)),
        ([("raw", text(size=1024))], Part(0, 1024)),
        ([CUT, RAW], Part(512, 1024)),
        ([CUT, ("throttle", ""), RAW], Part(512, 1024)),
        ([CUT, ("raw", "/i/disk")], None),
    ],
)
def test_parts_of_files(levels, wanted):
    layer = opened(*levels)
    assert part_of(layer) == wanted
    assert is_plain(layer, {}) == (wanted is None)


@pytest.mark.parametrize("said", ["json:[", "json:7", text(offset=["x"]), text(size="1.5M")])
def test_what_cannot_be_read_is_not_taken_for_the_whole(said):
    layer = opened(("raw", said))
    assert not is_plain(layer, {})
    with pytest.raises(UnsupportedError, match="cannot be read"):
        part_of(layer)


def test_the_description_opens_it_again():
    assert description(opened(RAW), DISK) == PART
    assert description(opened(CUT, RAW), DISK) == {"driver": "qcow2", "file": PART}


@pytest.mark.parametrize(
    ("levels", "words"),
    [([CUT, ("luks", ""), RAW], "not the whole"), ([RAW, RAW], "a part of a part")],
)
def test_what_cannot_be_described(levels, words):
    with pytest.raises(UnsupportedError, match=words):
        description(opened(*levels), DISK)


def test_encrypted_or_unseen():
    with pytest.raises(UnsupportedError, match="it is encrypted"):
        description(opened(RAW, encrypted=True), DISK)
    with pytest.raises(UnsupportedError, match="not the whole"):
        description(opened(RAW), {})
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


def test_whether_an_image_lies_in_a_part_of_its_file():
    def layer(filename, *, raw):
        drawing = Drawing().image("d0", "raw" if raw else "qcow2", under=None if raw else "r")
        drawing.filter("r", "raw", "d0-f").device("d0")
        drawing.nodes["d0" if raw else "r"]["file"] = filename
        return drawing.graph().device("vd0").chain.active

    for raw in (True, False):
        assert not in_part(layer("/i/d0", raw=raw))
        assert not in_part(layer('json:{"driver": "raw", "file": {"driver": "throttle"}}', raw=raw))
        assert in_part(layer('json:{"driver": "raw", "offset": 512, "file": {}}', raw=raw))
        assert in_part(layer('json:{"driver": "raw", "size": 512, "file": {}}', raw=raw))
        assert in_part(layer('json:{"driver": "raw", "file": {"dri', raw=raw))
